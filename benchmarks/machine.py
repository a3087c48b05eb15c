"""Where and with what a figure was measured: what every document in `results/` begins with."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("mixtral-serve", "torch", "ray", "runpod")


def describe() -> dict[str, Any]:
    """`{"date", "machine", "cores", "versions"}`; the versions are those of this environment."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{_processor()}, {platform.system()}, Python {platform.python_version()}",
        "cores": len(os.sched_getaffinity(0)),
        "versions": {name: version(name) for name in PACKAGES},
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
