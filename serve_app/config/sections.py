"""The sections of the settings: what can be chosen of model, engine, requests and the worker.

Each field has its unit and default in its docstring, from which docs/runpod.md's table is made.
Reads nothing; `settings.py` fills these in.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True
    )


class ModelSettings(_Section):
    """What is served."""

    name: str = "mistralai/Mixtral-8x7B-Instruct-v0.1"
    """A Hugging Face repository, a local folder, or "tiny": the model inside this package."""
    revision: str | None = None
    """Branch, tag or commit of the repository; None is its default branch."""
    served_model_name: str | None = None
    """The public name(s), comma separated, in `/v1/models`; None is `name`."""
    quantization: Literal["nf4", "fp4", "none"] = "nf4"
    """Of experts and attention; router, norms and embeddings stay floats in any case."""
    quantize_lm_head: bool = False
    """The output head in 4 bits too: 0.19 GB less for Mixtral 8x7B, 1,400 tokens of KV cache. It
    is quantised at each load, as no checkpoint has it."""
    absmax: Literal["bfloat16", "nested", "float32"] = "bfloat16"
    """How the scale of each 64 quantised weights is stored. Of Mixtral 8x7B's 25.2 GB, nested (8
    bits, a second look-up) saves 0.7 GB, 5,500 tokens of KV cache; float32 adds 1.5 GB and nothing
    that can be measured. A checkpoint that is quantised already keeps its own."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of activations and unquantised weights. auto: bfloat16 on a GPU, float32 on a CPU."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where the model runs. auto: on a GPU if there is one."""
    cache_dir: str | None = None
    """Keep a 4-bit copy of the model in this folder: the first start writes it, later ones read 25
    GB instead of 93. A network volume, say."""
    hf_token: SecretStr | None = None
    """For gated repositories. Environment only."""

    @field_validator("served_model_name")
    @classmethod
    def _names_something(cls, value: str | None) -> str | None:
        if value is not None and not value.replace(",", "").strip():
            raise ValueError("it must hold a name")
        return value

    @property
    def served_model_names(self) -> tuple[str, ...]:
        """The public names, the first one being the answer's `model`."""
        names = (self.served_model_name or self.name).split(",")
        return tuple(name.strip() for name in names if name.strip())


class EngineSettings(_Section):
    """How requests share the device."""

    max_model_len: int | None = Field(default=None, ge=16)
    """Tokens of prompt and answer together; None is what the checkpoint allows."""
    max_num_seqs: int = Field(default=32, ge=1)
    """Sequences decoded in one step."""
    max_waiting: int = Field(default=256, ge=0)
    """Requests that may queue for a place; more are answered 429."""
    block_size: int = Field(default=16, ge=1)
    """Tokens in one KV block."""
    kv_cache_tokens: int | None = Field(default=None, ge=16)
    """Tokens of KV cache; None is what the GPU's memory leaves, on a CPU 4 x max_model_len."""
    enable_prefix_caching: bool = True
    """Requests that begin alike, such as the turns of a conversation, share the KV blocks of what
    they have in common; what nobody uses stays until its room is needed."""
    gpu_memory_utilization: float = Field(default=1.0, gt=0, le=1)
    """Share of the GPU that this server may take; lower it where others use the GPU too. 1 GiB is
    kept for activations in any case. A 32 GB card has no more to spare beside 25 GB of weights."""
    max_num_batched_tokens: int = Field(default=512, ge=16)
    """Prompt and decode tokens in one step: long prompts are cut into chunks of this size."""
    num_threads: int | None = Field(default=None, ge=1)
    """Compute threads on a CPU; None leaves one core to the sockets."""

    @model_validator(mode="after")
    def _streams_fit_into_a_step(self) -> "EngineSettings":
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least "
                f"max_num_seqs ({self.max_num_seqs})"
            )
        return self


class ApiSettings(_Section):
    """What clients may ask."""

    keys: SecretStr | None = None
    """Accepted API keys, comma separated; None asks for none. Environment only."""
    max_tokens_limit: int | None = Field(default=None, ge=1)
    """The largest `max_tokens` a request may ask for; None is what the context holds."""
    max_prompt_chars: int = Field(default=100_000, ge=1)
    """Characters of a prompt, or of all messages together; more are answered 400."""
    max_body_bytes: int = Field(default=8_000_000, ge=1024)
    """Bytes of a request's body, also of a job's; more are answered 413."""
    request_timeout_s: float = Field(default=600.0, gt=0)
    """Seconds after which a request ends with 504."""
    retry_after_s: int = Field(default=2, ge=1)
    """Seconds in `Retry-After` when the queue is full."""


class RunpodSettings(_Section):
    """The RunPod worker."""

    max_concurrency: int | None = Field(default=None, ge=1)
    """Jobs taken at once; None is `engine.max_num_seqs` + `engine.max_waiting` / 4."""
    drain_s: float = Field(default=25.0, ge=0)
    """Seconds after SIGTERM in which jobs and HTTP requests that run are finished. Jobs that need
    longer fail with `retry: true` when four fifths have passed, so that they hear of it in time."""
    large_results: Literal["error", "volume"] = "error"
    """What becomes of a result over the platform's limit (10 MB, of `/runsync` 20 MB): an error, or
    a file `results/<job id>.json` on the volume, with `{"file", "bytes"}` as the output."""
    volume: str = "/runpod-volume"
    """Where the network volume is mounted."""
    progress_interval_s: float = Field(default=2.0, ge=0.1)
    """Least seconds between two progress updates of a job."""
    start: Literal["lazy", "eager"] = "lazy"
    """When the model loads: with the first job, within its execution time, or before any job is
    taken, within the platform's time for a worker to come up (7 minutes by default)."""
    execution_timeout_s: float = Field(default=600.0, gt=0)
    """The endpoint's execution timeout in seconds, 600 by the platform's default. Stops nothing: a
    load that is expected to take longer is said so."""
