"""Where and with what a figure was measured, and how `results/` keeps it."""

import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("mixtral-serve", "torch", "triton", "ray", "runpod")


def describe() -> dict[str, Any]:
    """`{"date", "machine", "cores", "versions"}`; the versions are those of this environment.

    A package that is not installed has none.
    """
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{_processor()}, {platform.system()}, Python {platform.python_version()}",
        "cores": len(os.sched_getaffinity(0)),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def publish(document: dict[str, Any], file: Path | None) -> None:
    """Prints the document as one line of JSON, the run's last; `file` gets it with its fields in
    lines, so that two runs can be compared."""
    if file is not None:
        save(document, file)
    print(json.dumps(document))


def save(document: dict[str, Any], file: Path) -> None:
    """Writes `file` in one step, so that nobody, and no end of this program, sees a half of it."""
    whole = file.with_name(file.name + ".part")
    whole.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    whole.replace(file)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
