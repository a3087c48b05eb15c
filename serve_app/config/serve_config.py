"""Reads the first application of the YAML that `serve run` takes."""

from pathlib import Path
from typing import Any

import yaml


class ConfigError(ValueError):
    """The configuration cannot work. The message is one sentence that names the key."""


def application(path: str | Path) -> dict[str, Any]:
    """Returns `applications[0]` of a Serve config. Raises `ConfigError` with the file's name."""
    try:
        document: Any = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}: is not valid YAML{line}.") from None
    match document:
        case {"applications": [dict(first), *_]}:
            return first
    raise ConfigError(f"{path}: needs `applications:` with one application in it.")
