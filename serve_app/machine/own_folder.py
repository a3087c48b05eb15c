"""Creates a folder in /tmp for this process. A later start removes the folder of a killed process.

The owner holds a lock on a file in the folder, which the kernel releases when the process ends for
any reason. A folder of this user with a free lock has no owner. Process ids would not work, because
two containers may share /tmp.

Many systems remove files from /tmp that nothing has used for 10 or 30 days (systemd-tmpfiles). It
leaves a folder alone that a process has locked by flock(2), and so the owner locks the folder too.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from serve_app.errors import MachineUnfit

ROOT = "/tmp"
"""Not TMPDIR, because that may be long, and a socket's path is limited to about a hundred
characters."""
LOCK = "mixtral-serve.lock"

_held: dict[Path, tuple[int, int]] = {}
"""The open lock file of each folder, and the open folder."""


def require_writable() -> None:
    """Raises `MachineUnfit` where /tmp cannot be written, as on a read-only root."""
    if not os.access(ROOT, os.W_OK | os.X_OK):
        raise MachineUnfit(
            f"{ROOT} cannot be written, and Ray keeps its session there; mount a writable folder "
            f"on it (docker run --tmpfs {ROOT}, or an emptyDir of Kubernetes)."
        )


def create(prefix: str) -> Path:
    """Returns a new folder that only this user can access.

    Removes the folders of dead processes with the same prefix first. Raises `MachineUnfit` where
    /tmp cannot be written.
    """
    require_writable()
    _remove_stale(prefix)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=ROOT))
    # The file gets the name of a lock only after it is locked.
    unnamed = folder / f"{LOCK}.new"
    _held[folder] = os.open(unnamed, os.O_RDWR | os.O_CREAT, 0o600), keep(folder)
    fcntl.flock(_held[folder][0], fcntl.LOCK_EX)
    unnamed.rename(folder / LOCK)
    return folder


def keep(folder: Path) -> int:
    """Makes systemd-tmpfiles leave `folder` alone until the returned file descriptor is closed."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor


def remove(folder: Path) -> None:
    """Removes a folder that `create` has made."""
    shutil.rmtree(folder, ignore_errors=True)
    for descriptor in _held.pop(folder):
        os.close(descriptor)


def _remove_stale(prefix: str) -> None:
    for lock in Path(ROOT).glob(f"{prefix}*/{LOCK}"):
        # Other users may have put files into /tmp; those are skipped.
        with contextlib.suppress(OSError):
            if lock.parent.is_symlink() or lock.parent.stat().st_uid != os.geteuid():
                continue
            descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)
            finally:
                os.close(descriptor)
