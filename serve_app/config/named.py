"""The configurations that this package brings along, by name."""

from pathlib import Path

from serve_app.config.serve_config import ConfigError

FOLDER = Path(__file__).parents[1] / "configs"
"""`configs/` of the repository; a wheel holds a copy."""


def names() -> list[str]:
    """`["local", "runpod", ...]`: each stands for a YAML file in `FOLDER`."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def find(config: str) -> Path:
    """Returns the file that `config` stands for: one of `names()`, or a path.

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
