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

    Raises `ConfigError` unless `host` is a text and `port` a port number.
    """
    match _document(path):
        case {"http_options": dict(given)}:
            options = {"host": "0.0.0.0", "port": 8000} | given
        case _:
            options = {"host": "0.0.0.0", "port": 8000}
    host, port = options["host"], options["port"]
    if not isinstance(host, str):
        raise ConfigError(f"{path}: `http_options.host` must be an address, got {host!r}.")
    if type(port) is not int or not 0 <= port <= 65535:  # YAML's `true` is an int to Python
        raise ConfigError(f"{path}: `http_options.port` must be 0 to 65535, got {port!r}.")
    return options


def port_setting(path: str | Path) -> str:
    """What errors call the HTTP port of the file `path`."""
    return f"{path}: `http_options.port`"


def _document(path: str | Path) -> Any:
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}: is not valid YAML{line}.") from None
