"""The sections of the settings: model, engine, API, RunPod worker and observability.

Each field's docstring gives its meaning, unit and default. `python -m tools.settings_table` writes
the table in docs/runpod.md from them.
"""

from ipaddress import ip_network
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True
    )


class ModelSettings(_Section):
    """The served model and the format of its weights."""

    name: str = "mistralai/Mixtral-8x7B-Instruct-v0.1"
    """A Hugging Face repository, a local folder, or "tiny" for the model inside this package."""
    revision: str | None = None
    """Branch, tag or commit of the repository; None is its default branch."""
    served_model_name: str | None = None
    """Public model names for `/v1/models`, comma separated; None is `name`."""
    quantization: Literal["nf4", "fp4", "none"] = "nf4"
    """4-bit format of the experts and the attention. Router, norms and embeddings stay floats."""
    quantize_lm_head: bool = False
    """Also quantizes lm_head to 4 bits, at each load. For Mixtral 8x7B this frees 0.19 GB, which is
    1,400 tokens of KV cache."""
    absmax: Literal["bfloat16", "nested"] = "bfloat16"
    """Format of the scale of each quantization group (64 weights) in the 4-bit copy in `cache_dir`.
    In memory every scale is bfloat16, which takes 25.2 GB for Mixtral 8x7B; nested (8 bits) is kept
    beside it in the files, 0.7 GB more, and `mixtral-serve convert` gives it back. A checkpoint
    that is already quantized keeps its own."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of activations and unquantized weights. auto is bfloat16 on a GPU, float32 on a CPU."""
    generation_config: Literal["auto", "vllm"] = "auto"
    """Sampling defaults of requests. auto is what the checkpoint's generation_config.json sets:
    temperature, top_p, top_k, min_p, repetition_penalty, and max_new_tokens as a limit; `/prompt`
    keeps its own temperature of 0.7. vllm leaves that file out, except for the tokens that end an
    answer."""
    custom_chat_template: str | None = None
    """A chat template (Jinja) in place of the checkpoint's: the path of a file, or the text itself.
    """
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device of the model. auto is a GPU, and the CPU for the tiny model."""
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

    @field_validator("served_model_name")
    @classmethod
    def _has_a_name(cls, value: str | None) -> str | None:
        if value is not None and not value.replace(",", "").strip():
            raise ValueError("it must hold a name")
        return value

    @property
    def served_model_names(self) -> tuple[str, ...]:
        """The public names. The first one is `model` in every response."""
        names = (self.served_model_name or self.name).split(",")
        return tuple(name.strip() for name in names if name.strip())


class EngineSettings(_Section):
    """The limits and the scheduling of the engine."""

    max_model_len: int | None = Field(default=None, ge=16)
    """Tokens of prompt and answer together; None is what the checkpoint allows."""
    max_num_seqs: int = Field(default=32, ge=1)
    """Sequences decoded in one step."""
    max_waiting: int = Field(default=256, ge=0)
    """Requests that may wait in the request queue, a list of prompts as one. A further request is
    answered 429."""
    block_size: int = Field(default=16, ge=1)
    """Tokens in one KV block."""
    kv_cache_tokens: int | None = Field(default=None, ge=16)
    """Tokens of KV cache; None is what the GPU's memory holds, or 4 x max_model_len on a CPU."""
    enable_prefix_caching: bool = True
    """Prompts with a common beginning, such as the turns of a conversation, share its KV blocks.
    Unused blocks are kept until their memory is needed."""
    gpu_memory_utilization: float = Field(default=1.0, gt=0, le=1)
    """Share of the GPU's memory that this server may use; lower it where other programs use the GPU
    too. 1 to 3 GB are always kept for a step's results. A 32 GB card needs 1.0: the weights take
    25 GB."""
    max_num_batched_tokens: int | None = Field(default=None, ge=16)
    """Prompt and decode tokens in one step; None is 8,192 on a GPU with 40 GB or more, 2,048 on a
    smaller one and 512 on a CPU. Longer prompts are split into prefill chunks. A larger value takes
    GPU memory; how long streams wait for prompts is `max_stall_s`."""
    max_stall_s: float = Field(default=0.35, gt=0)
    """Seconds that a stream may wait for its next token because a prompt is computed. A smaller
    value gives smoother streams and later first tokens."""
    prefill_share: float = Field(default=0.8, gt=0, lt=1)
    """Share of the device's time that prompts get while prompts and streams both wait."""
    step_timeout_s: float = Field(default=60.0, gt=0)
    """Seconds after which a step that has not ended counts as hung: the engine ends, and Serve
    replaces the replica. Where a step has taken more than a tenth of that, it is 10 times the
    longest step."""
    enforce_eager: bool = False
    """Launches the kernels of each decode step one by one instead of replaying captured CUDA
    graphs. Decoding is slower; the start is shorter and uses less GPU memory."""
    num_threads: int | None = Field(default=None, ge=1)
    """Most compute threads on a CPU; None is the number of cores. Long steps, such as those of
    prompts, use all; short ones use fewer, which leaves a core for network I/O, as do models that
    are not computed by compiled steps."""

    @model_validator(mode="after")
    def _sequences_fit_into_a_step(self) -> "EngineSettings":
        if (self.max_num_batched_tokens or self.max_num_seqs) < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least "
                f"max_num_seqs ({self.max_num_seqs})"
            )
        return self


class ApiSettings(_Section):
    """The limits of requests, and the API keys."""

    keys: SecretStr | None = None
    """Accepted API keys, comma separated; None requires no key. Read from the environment only."""
    keys_file: str | None = None
    """File of further API keys, with a name and limits for each; `mixtral-serve keys` writes it.
    The server follows its changes."""
    cors_origins: str | None = None
    """Origins of web pages that may call the API from a browser, comma separated, such as
    `https://chat.example.com`; `*` is every origin. None allows no other origin."""
    max_tokens_limit: int | None = Field(default=None, ge=1)
    """The largest `max_tokens` that a request may set; None is what the context holds."""
    max_prompt_chars: int = Field(default=100_000, ge=1)
    """Characters of a prompt, or of all messages together. A longer prompt is answered 400."""
    max_prompts: int = Field(default=1000, ge=1)
    """Prompts in one list (`prompts` or `items` of `/prompt`). A longer list is answered 400."""
    max_body_bytes: int = Field(default=8_000_000, ge=1024)
    """Bytes of the body of a request or job. A larger body is answered 413."""
    sanitize_control_tokens: bool = True
    """Whether a control token that a message contains, such as `</s>`, is text. false makes it the
    control token, as transformers' `apply_chat_template` does. Raw prompts may always contain
    them."""
    request_timeout_s: float = Field(default=600.0, gt=0)
    """Seconds from its arrival after which a request ends with 504."""
    retry_after_s: int = Field(default=1, ge=1)
    """Shortest `Retry-After` in seconds of a 429 for a full request queue, and that of a 503 while
    the server shuts down. The engine's measured rate gives longer ones, up to 60."""
    max_connections: int = Field(default=4096, ge=16)
    """Connections to HAProxy at once. Further ones wait until one of them closes."""
    max_connections_per_address: int | None = Field(default=None, ge=1)
    """Connections that one address may have to HAProxy at once; further ones are closed. None has
    no limit: behind a load balancer, all clients have its address."""
    trusted_proxies: str | None = None
    """Addresses or networks without that limit, comma separated, such as `10.0.0.0/8`."""

    @field_validator("trusted_proxies")
    @classmethod
    def _are_networks(cls, value: str | None) -> str | None:
        for network in (value or "").split(","):
            if network.strip():
                ip_network(network.strip(), strict=False)  # its error names the value
        return value

    @property
    def needs_key(self) -> bool:
        """Whether HTTP clients need an API key."""
        return self.keys is not None or self.keys_file is not None

    @property
    def fixed_keys(self) -> list[str]:
        """The keys in `keys`."""
        given = "" if self.keys is None else self.keys.get_secret_value()
        return [key.strip() for key in given.split(",") if key.strip()]

    @property
    def trusted_networks(self) -> list[str]:
        """The networks in `trusted_proxies`."""
        return [it.strip() for it in (self.trusted_proxies or "").split(",") if it.strip()]


class RunpodSettings(_Section):
    """The RunPod worker."""

    max_concurrency: int | None = Field(default=None, ge=1)
    """Prompts of jobs in flight at once: a job counts as many as its list has. None is
    `engine.max_num_seqs` for each replica + `engine.max_waiting` / 4. A job that does not fit
    beside others waits at the platform."""
    drain_s: float = Field(default=25.0, ge=0)
    """Seconds after SIGTERM in which running jobs and HTTP requests may finish. When four fifths
    have passed, the jobs that still run fail with `retry: true`, in time to be reported."""
    large_results: Literal["error", "volume"] = "error"
    """Output of a job whose result is over the platform's limit (10 MB, or 20 MB for `/runsync`):
    an error, or a file `results/<job id>.json` on the volume with `{"file", "bytes"}` as the
    output."""
    volume: str | None = None
    """Folder on the network volume; None is `/runpod-volume`, or `/workspace` where a volume is
    mounted there alone, as in pods. Without a mounted volume nothing is kept there."""
    progress_interval_s: float = Field(default=2.0, ge=0.1)
    """Minimum seconds between two progress updates of a job."""
    start: Literal["lazy", "eager"] = "lazy"
    """Time at which the model loads. lazy: with the first job, within that job's execution time.
    eager: before the worker takes a job, within the platform's time for a start (7 minutes by
    default)."""
    init_timeout_s: float = Field(default=420.0, gt=0)
    """Seconds that the platform gives a worker before it asks for jobs, or before `/ping` is 200.
    The platform reads RUNPOD_INIT_TIMEOUT; the worker warns when it expects the load to take
    longer."""
    execution_timeout_s: float = Field(default=600.0, gt=0)
    """The endpoint's execution timeout in seconds; the platform's default is 600. The worker does
    not enforce it: it warns when it expects the load to take longer."""


class ObservabilitySettings(_Section):
    """Logs and traces."""

    log_format: Literal["text", "json"] = "text"
    """Lines of the log. json writes each record as one JSON object with time, level, logger,
    message, and request_id where there is one."""
    otlp_traces_endpoint: str | None = None
    """URL to which the spans of answers are sent, by OTLP over HTTP, such as
    `http://127.0.0.1:4318/v1/traces`. None records no spans."""

    @field_validator("otlp_traces_endpoint")
    @classmethod
    def _is_http(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            raise ValueError("it must begin with http:// or https://; OTLP over gRPC is not sent")
        return value


SECTIONS: dict[str, type[_Section]] = {
    "model": ModelSettings,
    "engine": EngineSettings,
    "api": ApiSettings,
    "runpod": RunpodSettings,
    "observability": ObservabilitySettings,
}
"""The sections by their key in `args:`."""
