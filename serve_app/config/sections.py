"""The sections of the settings: model, engine, API (`api_settings.py`), RunPod worker and
observability.

Each field's docstring gives its meaning, unit and default. `python -m tools.settings_table` writes
the table in docs/runpod.md from them.
"""

from typing import Literal

from pydantic import Field, SecretStr, field_validator, model_validator

from serve_app.config.api_settings import ApiSettings
from serve_app.config.section import Section, items


class ModelSettings(Section):
    """The served model and the format of its weights."""

    name: str = "mistralai/Mixtral-8x7B-Instruct-v0.1"
    """The model: a Hugging Face repository, a local folder, or "tiny" for the model inside this
    package."""
    revision: str | None = None
    """Branch, tag or commit of the repository. None: its default branch."""
    served_model_name: str | None = None
    """Public names of the model, comma separated. Clients use them as `model`. None: `name`."""
    quantization: Literal["nf4", "fp4", "none"] = "nf4"
    """4-bit format of experts and attention; none keeps floats. Router, norms and embeddings are
    always floats."""
    quantize_lm_head: bool = False
    """Whether each load quantizes lm_head to 4 bits too. For Mixtral 8x7B this frees 0.19 GB, which
    is 1,400 tokens of KV cache."""
    absmax: Literal["bfloat16", "nested"] = "bfloat16"
    """Format of absmax, the scale of each quantization group (64 weights), in the files of the
    4-bit copy in `cache_dir`. In memory it is always bfloat16: 25.2 GB of weights for Mixtral 8x7B.
    With nested, the files also keep absmax in 8 bits (0.7 GB more), which `mixtral-serve convert`
    needs to write bitsandbytes' form again. A checkpoint in 4 bits keeps its own format."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of activations and float weights. auto: bfloat16 on a GPU, float32 on a CPU."""
    generation_config: Literal["auto", "vllm"] = "auto"
    """Sampling defaults of requests. auto: those of the checkpoint's generation_config.json
    (temperature, top_p, top_k, min_p, repetition_penalty, and max_new_tokens as a limit), except
    that `/prompt` has a temperature of 0.7. vllm: vLLM's defaults; only the tokens that end an
    answer come from that file."""
    custom_chat_template: str | None = None
    """A chat template (Jinja) that replaces the checkpoint's: the path of a file, or the text."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device of the model. auto: a GPU, or the CPU for the tiny model."""
    cache_dir: str | None = None
    """Folder for a 4-bit copy of the model, on a network volume for example. The first start writes
    it; later starts read 25 GB instead of 93. Compiled CUDA kernels are kept there too, by default
    in `~/.cache/mixtral-serve`."""
    hf_token: SecretStr | None = None
    """Hugging Face token for gated repositories. Read from the environment only."""

    @field_validator("absmax", mode="before")
    @classmethod
    def _is_in_memory(cls, value: object) -> object:
        if value == "float32":
            raise ValueError(
                "float32 is not held in memory any more; use bfloat16. Checkpoints with float32 "
                "absmax are still read, and `mixtral-serve convert --absmax float32` writes them"
            )
        return value

    @field_validator("hf_token")
    @classmethod
    def _fits_a_header(cls, value: SecretStr | None) -> SecretStr | None:
        # A token from a file ends with a line break; huggingface_hub leaves it out of its own
        # variables too.
        token = "" if value is None else value.get_secret_value().strip()
        if not (token.isascii() and token.isprintable()):
            raise ValueError("a token consists of printable ASCII characters")
        return SecretStr(token) if token else None

    @field_validator("served_model_name")
    @classmethod
    def _has_a_name(cls, value: str | None) -> str | None:
        if value is not None and not items(value):
            raise ValueError("it must hold a name")
        return value

    @property
    def served_model_names(self) -> tuple[str, ...]:
        """The public names. The first one is `model` in every response."""
        return tuple(items(self.served_model_name or self.name))


class EngineSettings(Section):
    """The limits and the scheduling of the engine."""

    max_model_len: int | None = Field(default=None, ge=16)
    """Maximum number of tokens of a prompt and its answer together. None: the checkpoint's maximum.
    """
    max_num_seqs: int = Field(default=32, ge=1)
    """Maximum number of sequences that run at the same time."""
    max_waiting: int = Field(default=256, ge=0)
    """Maximum number of requests that wait in the request queue; a list of prompts counts as one.
    Further requests get 429."""
    block_size: int = Field(default=16, ge=1)
    """Number of tokens in one KV block."""
    kv_cache_tokens: int | None = Field(default=None, ge=16)
    """Number of tokens in the KV cache. None: as many as fit into the GPU's memory, or 4 times
    `max_model_len` on a CPU."""
    enable_prefix_caching: bool = True
    """Whether prompts with a common beginning, such as the turns of a conversation, share its KV
    blocks. Unused blocks are kept until their memory is needed."""
    gpu_memory_utilization: float = Field(default=1.0, gt=0, le=1)
    """Share of the GPU's memory that this server may use. Lower it if other programs use the GPU
    too. 2 to 5 GB of it are kept for the results of a step. A GPU of 32 GB needs 1.0, because the
    weights take 25 GB."""
    max_num_batched_tokens: int | None = Field(default=None, ge=16)
    """Maximum number of tokens in one step, of prompts and decodes together. None: 8,192 on a GPU
    with 40 GB or more, 2,048 on a smaller one, 512 on a CPU. Longer prompts are split into prefill
    chunks. A larger value needs more GPU memory. `max_stall_s` limits the time that streams wait
    for prompts."""
    max_stall_s: float = Field(default=0.35, gt=0)
    """Maximum seconds that a stream waits for its next token while prompts are computed. A smaller
    value gives smoother streams and later first tokens."""
    prefill_share: float = Field(default=0.8, gt=0, lt=1)
    """Share of the device's time for prompts while both prompts and streams wait. Streams get the
    rest."""
    step_timeout_s: float = Field(default=60.0, gt=0)
    """Seconds after which a step that does not return counts as hung, or 10 times the longest step
    so far if that is longer. The engine then ends, and Serve replaces the replica."""
    enforce_eager: bool = False
    """Whether the kernels of each decode step are launched one by one, instead of replaying
    captured CUDA graphs. Decoding is slower; the start is shorter and needs less GPU memory."""
    num_threads: int | None = Field(default=None, ge=1, le=1024)
    """Maximum number of compute threads on a CPU. None: the number of cores for long steps of the
    compiled step, such as those of prompts; other steps leave a core for network I/O."""

    @model_validator(mode="after")
    def _sequences_fit_into_a_step(self) -> "EngineSettings":
        if (self.max_num_batched_tokens or self.max_num_seqs) < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least "
                f"max_num_seqs ({self.max_num_seqs})"
            )
        return self


class RunpodSettings(Section):
    """The RunPod worker."""

    max_concurrency: int | None = Field(default=None, ge=1)
    """Maximum number of prompts of the jobs that run at the same time; a job counts each prompt of
    its list. Further jobs wait at the platform. None: `engine.max_num_seqs` for each replica plus
    `engine.max_waiting` / 4."""
    drain_s: float = Field(default=25.0, ge=0)
    """Seconds after SIGTERM in which running jobs and HTTP requests may finish. Jobs that still run
    after four fifths of them fail with `retry: true`, so that there is time to report it."""
    large_results: Literal["error", "volume"] = "error"
    """What happens to a result over the platform's limit (10 MB, or 20 MB for `/runsync`). error:
    the job fails. volume: the result becomes the file `results/<job id>.json` on the volume, and
    the output is `{"file", "bytes"}`."""
    volume: str | None = None
    """Folder of the network volume. None: `/runpod-volume`, or `/workspace` if only that is
    mounted, as in pods. Nothing is stored there if no volume is mounted."""
    progress_interval_s: float = Field(default=2.0, ge=0.1)
    """Minimum seconds between two progress updates of a job."""
    start: Literal["lazy", "eager"] = "lazy"
    """When the model loads. lazy: with the first job, within that job's execution timeout. eager:
    before the worker takes a job, within `init_timeout_s`."""
    init_timeout_s: float = Field(default=420.0, gt=0)
    """Maximum seconds of a worker's start, until it asks for jobs or `/ping` is 200. The platform
    enforces it and reads it from RUNPOD_INIT_TIMEOUT. The worker warns if it expects the load to
    take longer."""
    execution_timeout_s: float = Field(default=600.0, gt=0)
    """The endpoint's execution timeout in seconds. The platform enforces it; set the same value
    here. The worker warns if it expects the load to take longer."""


class ObservabilitySettings(Section):
    """Logs and traces."""

    log_format: Literal["text", "json"] = "text"
    """Format of the log. json: one JSON object per line, with time, level, logger, message and
    further fields such as request_id."""
    otlp_traces_endpoint: str | None = None
    """URL of a collector that gets the spans of answers by OTLP over HTTP, such as
    `http://127.0.0.1:4318/v1/traces`. None: no spans are recorded."""

    @field_validator("otlp_traces_endpoint")
    @classmethod
    def _is_http(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            raise ValueError("it must begin with http:// or https://; OTLP over gRPC is not sent")
        return value

    @property
    def is_json(self) -> bool:
        """Whether the log is JSON."""
        return self.log_format == "json"


SECTIONS: dict[str, type[Section]] = {
    "model": ModelSettings,
    "engine": EngineSettings,
    "api": ApiSettings,
    "runpod": RunpodSettings,
    "observability": ObservabilitySettings,
}
"""The sections by their key in `args:`."""
