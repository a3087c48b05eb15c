"""Reads the first application of the YAML that `serve run` takes."""

from pathlib import Path
from typing import Any

import yaml


class ConfigError(ValueError):
    """The configuration cannot work. The message is one sentence that names the key."""


def application(path: str | Path) -> dict[str, Any]:
    """Returns `applications[0]` of a Serve config. Raises `ConfigError` with the file's name."""
    match _document(path):
        case {"applications": [dict(first), *_]}:
            return first
    raise ConfigError(f"{path}: needs `applications:` with one application in it.")


def http_options(path: str | Path) -> dict[str, Any]:
    """Returns `http_options` of a Serve config, with Serve's defaults for `host` and `port`.

    Raises `ConfigError` unless `host` is a text and `port` a number.
    """
    match _document(path):
        case {"http_options": dict(given)}:
            options = {"host": "0.0.0.0", "port": 8000} | given
        case _:
            options = {"host": "0.0.0.0", "port": 8000}
    for key, kind in (("host", str), ("port", int)):
        if not isinstance(options[key], kind):
            raise ConfigError(f"{path}: `http_options.{key}`: got {options[key]!r}.")
    return options


def _document(path: str | Path) -> Any:
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}: is not valid YAML{line}.") from None
