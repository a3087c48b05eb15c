"""Settings: everything that can be chosen, in one frozen model. The only reader of the environment.

The YAML that `serve run` takes is the readable truth: `applications[0].args` is a `Settings`.
`MIXTRAL_<SECTION>__<FIELD>` overrides one value, as do the names in `environment.FAMILIAR` that
RunPod's users already know. An unknown key or `MIXTRAL_*` name is an error. Secrets come from the
environment only, because Ray logs `args:` in clear.

Knows no torch and no Ray, and opens no file but the YAML it is given.
"""

import os
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from serve_app.config import environment
from serve_app.config.sections import ApiSettings, EngineSettings, ModelSettings, RunpodSettings
from serve_app.config.serve_config import ConfigError, application

__all__ = ["ConfigError", "EntrySettings", "Settings", "application", "unneeded_names"]

PREFIX = "MIXTRAL_"


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
