"""The versions that pyproject.toml pins."""

import tomllib
from pathlib import Path


def pin(name: str) -> str:
    """Returns the pinned version of a package, whose `name` may have an extra."""
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    (version,) = (
        each.partition("==")[2] for each in project["dependencies"] if each.startswith(f"{name}==")
    )
    return str(version)
