"""Folders on a real mount, and commands that run with mounts of their own."""

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]
"""Runs a command as root of a user namespace, with a mount namespace of its own."""


@contextmanager
def mounted_folder() -> Iterator[Path]:
    """Yields a folder on a mount of its own, as a network volume's is: every Linux has /dev/shm."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="mixtral-serve-test-") as folder:
        yield Path(folder)


def can_mount() -> bool:
    """Returns whether this machine allows a process to make mounts in a namespace of its own."""
    try:
        return subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False
