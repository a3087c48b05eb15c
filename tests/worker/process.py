"""`runpod_entry.py` as somebody types it, outside the platform."""

import os
import subprocess
import sys
from pathlib import Path

ENTRY = Path(__file__).parents[2] / "runpod_entry.py"
TINY = ENTRY.parent / "configs" / "tiny.yaml"


def environment(home: Path, **more: str) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "HOME": str(home), "SERVE_CONFIG": str(TINY), **more}


def run_entry(home: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Runs it to its end in the folder `home`."""
    return subprocess.run(
        [sys.executable, str(ENTRY), *arguments],
        cwd=home,
        env={**environment(home), **more},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
