"""Settings: one frozen model with everything that a user can choose.

`applications[0].args` of the YAML for `serve run` is a `Settings`. The environment overrides single
values: `MIXTRAL_<SECTION>__<FIELD>` first, then the names of vLLM and RunPod in `environment.py`.
An unknown key or `MIXTRAL_*` name is an error. Secrets come from the environment only, because Ray
logs `args:` in clear.

Only this module reads the environment. It opens no file except the YAML.
"""

import os
from pathlib import Path
from typing import Any

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from serve_app.config import environment, sources
from serve_app.config.api_settings import ApiSettings
from serve_app.config.section import items
from serve_app.config.sections import (
    SECTIONS,
    EngineSettings,
    ModelSettings,
    ObservabilitySettings,
    RunpodSettings,
)
from serve_app.config.serve_config import ConfigError, application
from serve_app.config.sources import PREFIX
from serve_app.config.unused_names import unused_names as unused_names_in

__all__ = [
    "ClientSettings",
    "ConfigError",
    "EntrySettings",
    "Settings",
    "application",
    "unused_names",
    "with_variables",
]

SECRETS = {"api.keys": "API_KEYS", "model.hf_token": "HF_TOKEN"}
"""Settings that must not be written in `args:`, and the environment variable for each."""

RENAMED = {
    "model.served_name": "model.served_model_name",
    "model.quantize_head": "model.quantize_lm_head",
    "engine.max_running": "engine.max_num_seqs",
    "engine.max_step_tokens": "engine.max_num_batched_tokens",
    "engine.gpu_memory_fraction": "engine.gpu_memory_utilization",
    "engine.prefix_cache": "engine.enable_prefix_caching",
    "runpod.concurrency": "runpod.max_concurrency",
}
"""Old names of settings and their new names. An old name is an error."""


class Settings(BaseSettings):
    """All settings, as in `args:` of the Serve application. Frozen."""

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
    observability: ObservabilitySettings = ObservabilitySettings()
    load_log: str | None = None
    """JSON-lines file into which a replica writes its load phases while it loads."""

    def __init__(self, **values: Any) -> None:
        _refuse_keys(values)
        _refuse_variables()
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
        """Returns the sources in order of precedence: environment, aliases, YAML."""
        return env_settings, _AliasSource(settings_cls), init_settings

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Settings":
        """Reads `applications[0].args` of a Serve config. Raises `ConfigError`."""
        return cls.from_args(application(path).get("args") or {}, str(path))

    @classmethod
    def from_args(cls, args: dict[str, Any], where: str) -> "Settings":
        """Validates `args`. Raises `ConfigError` with `where` and the first wrong key."""
        try:
            _refuse_unknown_sections(args)  # a key such as `self` cannot become a parameter
            return cls(**args)
        except ValidationError as error:
            raise ConfigError(_first_error(error, where)) from None
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None


class EntrySettings(BaseSettings):
    """The environment variables that `runpod_entry.py` reads before the YAML."""

    model_config = SettingsConfigDict(
        frozen=True, extra="ignore", env_ignore_empty=True, use_attribute_docstrings=True
    )

    serve_config: str = "configs/runpod.yaml"
    """The YAML to serve: the file that `serve run` takes."""
    runpod_serverless: bool = True
    """Whether the worker takes RunPod jobs. false: it serves HTTP on `PORT`."""
    port: int = Field(default=8000, ge=0, le=65535)
    """The HTTP port, on every interface."""
    port_health: int | None = Field(default=None, ge=0, le=65535)
    """The port of `/ping` for a load balancer. None: `PORT`."""
    runpod_webhook_get_job: str | None = None
    """Address from which the worker takes jobs. Only the platform sets it."""
    runpod_endpoint_id: str | None = None
    """The endpoint's id. Only the platform sets it. If it is set, log lines are JSON."""

    @classmethod
    def from_environment(cls) -> "EntrySettings":
        """Reads the environment. Raises `ConfigError` with the first wrong variable."""
        try:
            return cls()
        except ValidationError as error:
            raise ConfigError(_first_error(error, None)) from None


class ClientSettings(BaseSettings):
    """The environment variables that `mixtral-serve chat` reads."""

    model_config = SettingsConfigDict(
        frozen=True, extra="ignore", env_ignore_empty=True, use_attribute_docstrings=True
    )

    api_keys: SecretStr | None = None
    """Accepted API keys of a server on this machine, comma separated."""
    openai_api_key: SecretStr | None = None
    """The variable of OpenAI's own client."""

    @property
    def api_key(self) -> str | None:
        """The key to send: OPENAI_API_KEY, otherwise the first of API_KEYS, otherwise None."""
        chosen = self.openai_api_key or self.api_keys
        keys = items(chosen.get_secret_value()) if chosen else []
        return keys[0] if keys else None


class _AliasSource(PydanticBaseSettingsSource):
    """The aliases in `environment.py` as a settings source."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        raise NotImplementedError  # part of the interface; __call__ does the work

    def __call__(self) -> dict[str, Any]:
        return dict(environment.alias_values(os.environ))


def unused_names() -> str | None:
    """Returns a line that lists the variables that are set but have no effect; None if there are
    none."""
    return unused_names_in(os.environ)


def hides_gpus() -> bool:
    """Returns whether `CUDA_VISIBLE_DEVICES` chooses some of this machine's GPUs."""
    return "CUDA_VISIBLE_DEVICES" in os.environ


def _refuse_keys(values: dict[str, Any]) -> None:
    _refuse_unknown_sections(values)
    for path, name in SECRETS.items():
        section, field = path.split(".")
        if _fields(values, section).get(field) is not None:
            raise ConfigError(f"`{path}` is a secret, and Ray logs `args:`; set {name} instead.")
    for path, new in RENAMED.items():
        section, field = path.split(".")
        if field in _fields(values, section):
            raise ConfigError(f"`{path}` has a new name: `{new}`.")


def _refuse_unknown_sections(values: dict[str, Any]) -> None:
    # pydantic-settings gives a meaning to some keys of its own, such as `_env_file`.
    for key in values:
        if key not in Settings.model_fields:
            raise ConfigError(f"`{key}` is not a setting.")


def _fields(values: dict[str, Any], section: str) -> dict[str, Any]:
    fields = values.get(section)
    return fields if isinstance(fields, dict) else {}


def _refuse_variables() -> None:
    paths = [f"{name}.{field}" for name, model in SECTIONS.items() for field in model.model_fields]
    variables = set(map(sources.variable, ["load_log", *paths]))
    renamed = {sources.variable(old): sources.variable(new) for old, new in RENAMED.items()}
    for name in os.environ:
        if not name.upper().startswith(PREFIX) or name.upper() in variables:
            continue
        if new := renamed.get(name.upper()):
            raise ConfigError(f"the environment sets {name}, which has a new name: {new}.")
        raise ConfigError(f"the environment sets {name}, which is not a setting.")


def with_variables(message: str) -> str:
    """Returns `message` with the variable after each `section.field` that a variable sets."""
    return sources.with_variables(os.environ, message)


def _first_error(error: ValidationError, where: str | None) -> str:
    """Returns the first error in one sentence. It begins with the variable, or with `where` and the
    key.

    `where` is the YAML; None is the environment alone, whose variables are the keys in upper case.
    """
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    variable = key.upper() if where is None else sources.source(os.environ, key)
    name = f"The environment: {variable}" if variable else f"{where}: `{key}`"
    if first["type"] == "extra_forbidden":
        return f"{name} is not a setting."
    if first["type"] == "value_error":
        return f"{name}: {first['ctx']['error']}{sources.set_in(os.environ, key)}."
    # The value of a whole section is hidden too, because it may contain a secret.
    is_hidden = key in SECRETS or key in Settings.model_fields
    is_shown = not is_hidden and isinstance(first["input"], str | int | float)
    got = f", got {first['input']!r:.100}" if is_shown else ""
    return f"{name}: {first['msg']}{got}."
