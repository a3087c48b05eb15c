"""Runs `runpod_entry.py` in a process, without a platform."""

import subprocess
import sys
from pathlib import Path

from tests.environment import bare

ENTRY = Path(__file__).parents[2] / "runpod_entry.py"
TINY = ENTRY.parent / "configs" / "tiny.yaml"


def environment(home: Path, **more: str) -> dict[str, str]:
    return {**bare(home), "SERVE_CONFIG": str(TINY), **more}


def run_entry(home: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Runs it in the folder `home` and waits for its end."""
    return subprocess.run(
        [sys.executable, str(ENTRY), *arguments],
        cwd=home,
        env={**environment(home), **more},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
