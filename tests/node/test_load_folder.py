"""The folder of the load log: removed at the end of the process, or by the next start."""

import subprocess
import sys
from pathlib import Path

import pytest

START = """
import os, sys
from serve_app.config.settings import Settings
from serve_app.node.cluster import with_load_log
print(with_load_log(Settings()).load_log)
sys.stdout.flush()
if sys.argv[1] == "killed":
    os.kill(os.getpid(), 9)
sys.exit(1)
"""


def folder_of(end: str) -> Path:
    """Returns the folder of a process that has failed or was killed, as `end` says."""
    command = [sys.executable, "-c", START, end]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    assert done.returncode == {"killed": -9, "failed": 1}[end]
    return Path(done.stdout.strip()).parent


@pytest.mark.parametrize("end", ["failed", "killed"])
def test_no_folder_stays_behind(end: str) -> None:
    """A process that ends removes its folder; that of a killed one goes with the next start."""
    folder = folder_of(end)
    assert folder.name.startswith("mixtral-load-")
    assert folder.exists() == (end == "killed")
    folder_of("failed")
    assert not folder.exists()
