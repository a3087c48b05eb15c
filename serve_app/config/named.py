"""The configurations of this package, by name."""

from pathlib import Path

from serve_app.config.serve_config import ConfigError

FOLDER = Path(__file__).parents[1] / "configs"
"""`configs/` of the repository; a wheel contains a copy."""


def names() -> list[str]:
    """Returns `["local", "runpod", ...]`: the names of the YAML files in `FOLDER`."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def find(config: str) -> Path:
    """Returns the file with the name `config` (one of `names()`), or the path `config`.

    Raises `ConfigError` if it is neither.
    """
    if config in names():
        return FOLDER / f"{config}.yaml"
    path = Path(config)
    if path.suffix in (".yaml", ".yml") or path.exists():
        return path
    raise ConfigError(
        f"There is no configuration {config!r}; use {', '.join(names())}, or a YAML file's path."
    )
