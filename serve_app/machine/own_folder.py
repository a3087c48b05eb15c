"""A folder of this process in /tmp, which a later start removes if this process was killed.

The owner holds a lock on a file in it, which the kernel frees when the process ends in whatever
way. A folder of this user whose lock is free has no owner. Numbers of processes would not do: two
containers may share /tmp.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

ROOT = "/tmp"
"""Not TMPDIR, which may be long: the path of a socket has some hundred characters."""
LOCK = "mixtral-serve.lock"

_held: dict[Path, int] = {}
"""The open lock file of each folder."""


def create(prefix: str) -> Path:
    """Returns a new folder for this user alone; removes those of dead processes with that prefix
    first."""
    _remove_stale(prefix)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=ROOT))
    # It has the name of a lock only when it is one.
    unnamed = folder / f"{LOCK}.new"
    _held[folder] = os.open(unnamed, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(_held[folder], fcntl.LOCK_EX)
    unnamed.rename(folder / LOCK)
    return folder


def remove(folder: Path) -> None:
    """Removes a folder that `create` has made."""
    shutil.rmtree(folder, ignore_errors=True)
    os.close(_held.pop(folder))


def _remove_stale(prefix: str) -> None:
    for lock in Path(ROOT).glob(f"{prefix}*/{LOCK}"):
        # /tmp belongs to everybody: what others put there is left alone.
        with contextlib.suppress(OSError):
            if lock.parent.is_symlink() or lock.parent.stat().st_uid != os.geteuid():
                continue
            descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)
            finally:
                os.close(descriptor)
