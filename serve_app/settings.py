"""Settings: everything that can be chosen, in one frozen model. The only reader of the environment.

The YAML that `serve run` takes is the readable truth: `applications[0].args` is a `Settings`.
`MIXTRAL_<SECTION>__<FIELD>` overrides one value, as do the names in `environment.FAMILIAR` that
RunPod's users already know. An unknown key or `MIXTRAL_*` name is an error. Secrets come from the
environment only, because Ray logs `args:` in clear.

Knows no torch and no Ray, and opens no file but the YAML it is given.
"""

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from serve_app import environment
from serve_app.serve_config import ConfigError, application

__all__ = ["ConfigError", "EntrySettings", "Settings", "application", "unneeded_names"]

PREFIX = "MIXTRAL_"


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
    served_name: str | None = None
    """The public name(s), comma separated, in `/v1/models`; None is `name`."""
    quantization: Literal["nf4", "fp4", "none"] = "nf4"
    """Of experts and attention; router, norms and embeddings stay floats in any case."""
    quantize_head: bool = False
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

    @field_validator("served_name")
    @classmethod
    def _names_something(cls, value: str | None) -> str | None:
        if value is not None and not value.replace(",", "").strip():
            raise ValueError("it must hold a name")
        return value

    @property
    def served_names(self) -> tuple[str, ...]:
        """The public names, the first one being the answer's `model`."""
        names = (self.served_name or self.name).split(",")
        return tuple(name.strip() for name in names if name.strip())


class EngineSettings(_Section):
    """How requests share the device."""

    max_model_len: int | None = Field(default=None, ge=16)
    """Tokens of prompt and answer together; None is what the checkpoint allows."""
    max_running: int = Field(default=32, ge=1)
    """Sequences decoded in one step."""
    max_waiting: int = Field(default=256, ge=0)
    """Requests that may queue for a place; more are answered 429."""
    block_size: int = Field(default=16, ge=1)
    """Tokens in one KV block."""
    kv_cache_tokens: int | None = Field(default=None, ge=16)
    """Tokens of KV cache; None is what the GPU's memory leaves, on a CPU 4 x max_model_len."""
    prefix_cache: bool = True
    """Requests that begin alike, such as the turns of a conversation, share the KV blocks of what
    they have in common; what nobody uses stays until its room is needed."""
    gpu_memory_fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of the GPU that this server may take; lower it where others use the GPU too. 1 GiB is
    kept for activations in any case. A 32 GB card has no more to spare beside 25 GB of weights."""
    max_step_tokens: int = Field(default=512, ge=16)
    """Prompt and decode tokens in one step: long prompts are cut into chunks of this size."""
    num_threads: int | None = Field(default=None, ge=1)
    """Compute threads on a CPU; None leaves one core to the sockets."""

    @model_validator(mode="after")
    def _streams_fit_into_a_step(self) -> "EngineSettings":
        if self.max_step_tokens < self.max_running:
            raise ValueError(
                f"max_step_tokens ({self.max_step_tokens}) must be at least max_running "
                f"({self.max_running})"
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

    concurrency: int | None = Field(default=None, ge=1)
    """Jobs taken at once; None is `engine.max_running` + `engine.max_waiting` / 4."""
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


class Settings(BaseSettings):
    """All settings. Equals `args:` of the Serve application; frozen."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        env_ignore_empty=True,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )

    model: ModelSettings = ModelSettings()
    engine: EngineSettings = EngineSettings()
    api: ApiSettings = ApiSettings()
    runpod: RunpodSettings = RunpodSettings()
    load_log: str | None = None
    """JSON-lines file that the load phases are written to, for whoever started the replica."""

    def __init__(self, **values: Any) -> None:
        _refuse_unknown_keys(values)
        _refuse_secrets(values)
        _refuse_unknown_names()
        super().__init__(**values)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment first: it overrides the YAML, one value at a time."""
        return env_settings, _KnownNames(settings_cls), init_settings

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Settings":
        """The settings of `applications[0].args` in a Serve config; raises `ConfigError`."""
        return cls.from_args(application(path).get("args") or {}, str(path))

    @classmethod
    def from_args(cls, args: dict[str, Any], where: str) -> "Settings":
        """Validates `args`; the `ConfigError` names `where` and the first wrong key."""
        try:
            _refuse_unknown_keys(args)
            return cls(**args)
        except ValidationError as error:
            raise ConfigError(f"{where}: {_first_error(error)}") from None
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None


class EntrySettings(BaseSettings):
    """What `runpod_entry.py` asks the environment before it knows which YAML to read."""

    model_config = SettingsConfigDict(
        frozen=True, extra="ignore", env_ignore_empty=True, use_attribute_docstrings=True
    )

    serve_config: str = "configs/runpod.yaml"
    """The YAML to serve: the file that `serve run` takes."""
    runpod_serverless: bool = True
    """true: take jobs. false: serve HTTP on `PORT`."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Where HTTP is served, on every interface."""
    port_health: int | None = Field(default=None, ge=0, le=65535)
    """Where `/ping` tells a load balancer how far the server is; None: nowhere but on `PORT`."""
    runpod_webhook_get_job: str | None = None
    """Set by the platform only: its presence means that jobs come from there."""

    @classmethod
    def from_environment(cls) -> "EntrySettings":
        """What the environment says; raises `ConfigError` naming the first wrong variable."""
        try:
            return cls()
        except ValidationError as error:
            raise ConfigError(f"The environment: {_first_error(error)}") from None


class _KnownNames(PydanticBaseSettingsSource):
    """`environment.FAMILIAR` as a settings source."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        raise NotImplementedError  # part of the interface; __call__ does the work

    def __call__(self) -> dict[str, Any]:
        return dict(environment.familiar(os.environ))


def unneeded_names() -> str | None:
    """One line about names of older workers that are set and change nothing; None without any."""
    return environment.unneeded(os.environ)


SECRETS = {"api.keys": "API_KEYS", "model.hf_token": "HF_TOKEN"}
"""Settings that are never written down, and the names that hold them."""


def _refuse_unknown_keys(values: dict[str, Any]) -> None:
    # pydantic-settings itself would act on some, such as `_env_file`.
    for key in values:
        if key not in Settings.model_fields:
            raise ConfigError(f"`{key}` is no setting of ours.")


def _refuse_secrets(values: dict[str, Any]) -> None:
    for path, name in SECRETS.items():
        section, key = path.split(".")
        given = values.get(section)
        if isinstance(given, dict) and given.get(key) is not None:
            raise ConfigError(f"`{path}` is a secret, and Ray logs `args:`; set {name} instead.")


def _refuse_unknown_names() -> None:
    known = {f"{PREFIX}LOAD_LOG"}
    for section, info in Settings.model_fields.items():
        fields = getattr(info.annotation, "model_fields", {})
        known |= {f"{PREFIX}{section}__{name}".upper() for name in fields}
    for name in os.environ:
        if name.upper().startswith(PREFIX) and name.upper() not in known:
            raise ConfigError(f"the environment sets {name}, which is no setting of ours.")


def _first_error(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"`{key}` is no setting of ours."
    if first["type"] == "value_error":
        return f"`{key}`: {first['ctx']['error']}."
    # Never a secret, nor a section as a whole: somebody may have written one there.
    is_hidden = key in SECRETS or key in Settings.model_fields
    is_shown = not is_hidden and isinstance(first["input"], str | int | float)
    got = f", got {first['input']!r:.100}" if is_shown else ""
    return f"`{key}`: {first['msg']}{got}."
