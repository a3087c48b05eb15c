"""The network volume: a mounted folder that outlives the container.

RunPod mounts it at /runpod-volume in serverless workers and at /workspace in pods. A folder that
exists without a mount, such as one of the image, is on the container's disk and is lost with the
container.
"""

import os
import re
import tempfile
from pathlib import Path

SERVERLESS = Path("/runpod-volume")
PLACES = (SERVERLESS, Path("/workspace"))
MOUNT_TABLE = Path("/proc/self/mountinfo")
"""The kernel's mount table. The fifth field of a line is the mount point, see proc(5).
`os.path.ismount` does not see bind mounts of one file system."""
ROOT = Path("/")


def volume_folder(chosen: str | None) -> Path:
    """Returns `chosen`; if it is None, the first folder of `PLACES` that is mounted, or `PLACES[0]`
    if none is."""
    if chosen is not None:
        return Path(chosen).expanduser()
    return next((place for place in PLACES if is_mounted(place)), PLACES[0])


def is_mounted(folder: Path) -> bool:
    """Returns whether `folder` is on a mount other than the root file system.

    A folder that does not exist yet counts as part of its nearest existing parent.
    """
    points = _mount_points()
    folder = Path(os.path.realpath(folder))
    above = (folder, *folder.parents)
    is_file = os.path.exists(folder) and not os.path.isdir(folder)
    return not is_file and next(parent for parent in above if parent in points) != ROOT


def write_problem(folder: Path) -> str | None:
    """Returns the reason why `folder`, or its nearest existing parent, cannot be written; None if
    it can."""
    existing = nearest_existing(folder)
    try:
        # A real write: permissions are unreliable on network volumes and do not bind root.
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"1")
    except OSError as error:
        return f"{existing} cannot be written by user {os.getuid()} ({error.strerror})"
    return None


def file_problem(path: Path) -> str | None:
    """Returns the reason why the file `path` cannot be written; None if it can."""
    if path.is_dir():
        return "this is a folder"
    folder = path.absolute().parent
    return write_problem(folder) if folder.is_dir() else "its folder does not exist"


def nearest_existing(folder: Path) -> Path:
    """Returns `folder`, or its nearest parent that exists and is visible to this user."""
    above = (folder, *folder.absolute().parents)
    return next(parent for parent in above if os.path.exists(parent))  # False without permission


def volume_problem(folder: Path) -> str | None:
    """Returns the reason why files in `folder` would not be kept; None if they are kept on a
    volume."""
    return write_problem(folder) if is_mounted(folder) else f"no volume is mounted at {folder}"


def _mount_points() -> set[Path]:
    if not MOUNT_TABLE.exists():  # not Linux
        return {ROOT, *(place for place in PLACES if place.is_mount())}
    lines = MOUNT_TABLE.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    return {Path(_unescaped(line.split(" ")[4])) for line in lines}


def _unescaped(field: str) -> str:
    r"""Returns a field of the mount table without its escapes: a space is written as \040."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
