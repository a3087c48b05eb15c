"""Reads the YAML of `serve run`, which has one application."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml


class ConfigError(ValueError):
    """The configuration cannot work. The message is one sentence that names the key."""


USED = {"applications", "http_options", "proxy_location"}
USED_OF_APPLICATION = {"args", "deployments", "import_path", "name", "route_prefix"}


class _Loader(yaml.SafeLoader):
    """A YAML loader that refuses repeated keys, of which PyYAML would silently use the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen and key.value != "<<":
                line = key.start_mark.line + 1
                raise ConfigError(
                    f"`{key.value}` in line {line} is a duplicate key; remove one of them."
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def application(path: str | Path) -> dict[str, Any]:
    """Returns the application of a Serve config. Raises `ConfigError` unless there is one."""
    match _document(path):
        case {"applications": [dict(one)]}:
            return one
        case {"applications": [_, _, *_] as several}:
            raise ConfigError(
                f"{path}: `applications` has {len(several)} entries, and a server has one model; "
                "leave one, and write a file and start a server for each other one."
            )
    raise ConfigError(f"{path}: needs `applications:` with one application in it.")


def unused_keys(path: str | Path) -> list[str]:
    """Returns the keys of a Serve config that only `serve run` uses."""
    return list(_unused_keys(_document(path), application(path)))


def _unused_keys(document: dict[str, Any], application: dict[str, Any]) -> Iterator[str]:
    yield from (key for key in document if key not in USED)
    if document.get("proxy_location") == "Disabled":
        yield "proxy_location"
    where = "applications.0."
    yield from (f"{where}{key}" for key in application if key not in USED_OF_APPLICATION)
    if application.get("route_prefix", "/") != "/":
        yield f"{where}route_prefix"


def may_be_several(path: str | Path) -> bool:
    """Returns whether the deployment may have more than one replica."""
    overrides = application(path).get("deployments") or []
    return any(
        override.get("num_replicas", 1) != 1 or "autoscaling_config" in override
        for override in overrides
    )


def num_replicas(path: str | Path) -> int:
    """Returns the number of replicas in the YAML; 1 with autoscaling, where Serve decides."""
    overrides = application(path).get("deployments") or []
    numbers = [override["num_replicas"] for override in overrides if "num_replicas" in override]
    return next((number for number in numbers if isinstance(number, int)), 1)


def http_options(path: str | Path) -> dict[str, Any]:
    """Returns `http_options` of a Serve config, with Serve's defaults for `host` and `port`.

    Raises `ConfigError` if `host` is not a string or `port` is not a port number.
    """
    match _document(path):
        case {"http_options": dict(values)}:
            options = {"host": "0.0.0.0", "port": 8000} | values
        case _:
            options = {"host": "0.0.0.0", "port": 8000}
    host, port = options["host"], options["port"]
    if not isinstance(host, str):
        raise ConfigError(f"{path}: `http_options.host` must be an address, got {host!r}.")
    if type(port) is not int or not 0 <= port <= 65535:  # YAML's `true` is an int to Python
        raise ConfigError(f"{path}: `http_options.port` must be 0 to 65535, got {port!r}.")
    return options


def port_setting(path: str | Path) -> str:
    """Returns the name of the HTTP port of the file `path` for error messages."""
    return f"{path}: `http_options.port`"


def _document(path: str | Path) -> Any:
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}: the file is not valid YAML{line}.") from None
