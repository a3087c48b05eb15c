"""The network volume: a folder on a mount, which outlives the container.

RunPod mounts it at /runpod-volume in serverless workers and at /workspace in pods. A folder that
exists without a mount, such as one that an image made, is part of the container's disk and is lost
with the container.
"""

import os
import re
import tempfile
from pathlib import Path

PLACES = (Path("/runpod-volume"), Path("/workspace"))
MOUNT_TABLE = Path("/proc/self/mountinfo")
"""The kernel's mount table. The fifth field of a line is the mount point, see proc(5).
`os.path.ismount` does not see bind mounts of one file system."""
ROOT = Path("/")


def volume_folder(chosen: str | None) -> Path:
    """`chosen`, or without one the first of `PLACES` that is mounted, else the first."""
    if chosen is not None:
        return Path(chosen).expanduser()
    return next((place for place in PLACES if is_mounted(place)), PLACES[0])


def is_mounted(folder: Path) -> bool:
    """Returns whether `folder` lies on a mount other than the root file system.

    A folder that does not exist yet lies where it would be made.
    """
    points = _mount_points()
    folder = Path(os.path.realpath(folder))
    above = (folder, *folder.parents)
    is_file = os.path.exists(folder) and not os.path.isdir(folder)
    return not is_file and next(each for each in above if each in points) != ROOT


def write_problem(folder: Path) -> str | None:
    """Returns why nothing can be written to `folder` or where it would be made; None where it can
    be."""
    existing = nearest_existing(folder)
    try:
        # A real write: permissions are unreliable on network volumes and do not bind root.
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"1")
    except OSError as error:
        return f"{existing} cannot be written by user {os.getuid()} ({error.strerror})"
    return None


def nearest_existing(folder: Path) -> Path:
    """`folder`, or the nearest folder above it that this user sees."""
    above = (folder, *folder.absolute().parents)
    return next(each for each in above if os.path.exists(each))  # False without permission


def volume_problem(folder: Path) -> str | None:
    """Returns why nothing can be kept in `folder` of the volume; None where it can be."""
    return write_problem(folder) if is_mounted(folder) else f"no volume is mounted at {folder}"


def _mount_points() -> set[Path]:
    if not MOUNT_TABLE.exists():  # not Linux
        return {ROOT, *(place for place in PLACES if place.is_mount())}
    lines = MOUNT_TABLE.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    return {Path(_unescaped(line.split(" ")[4])) for line in lines}


def _unescaped(field: str) -> str:
    r"""A field of the mount table, which writes a space as \040."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
