"""Free main memory of this machine, within the container's limit.

psutil reports the machine's memory; the container's limit and its out-of-memory kills are in the
files of its cgroup (Linux: Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst).
"""

from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")


def free_bytes(cgroup: Path = CGROUP) -> int:
    """Bytes that new processes can have without swapping and within the container's limit."""
    free: int = psutil.virtual_memory().available
    if (limit := limit_bytes(cgroup)) is not None:
        free = min(free, max(0, limit - _held_bytes(cgroup)))
    return free


def limit_bytes(cgroup: Path = CGROUP) -> int | None:
    """The container's memory limit; None where it has none below the machine's memory."""
    for file in (cgroup / "memory.max", cgroup / "memory" / "memory.limit_in_bytes"):
        if (limit := _number(file)) is not None and limit < psutil.virtual_memory().total:
            return limit
    return None


def num_oom_kills(cgroup: Path = CGROUP) -> int:
    """Processes of this container that the kernel's out-of-memory killer has killed so far."""
    for file in (cgroup / "memory.events", cgroup / "memory" / "memory.oom_control"):
        if (count := _field(file, "oom_kill")) is not None:
            return count
    return 0


def _held_bytes(cgroup: Path) -> int:
    """Memory of the container without its page cache, which the kernel reclaims on demand."""
    for file, prefix in (
        (cgroup / "memory.current", ""),
        (cgroup / "memory" / "memory.usage_in_bytes", "total_"),
    ):
        if (used := _number(file)) is not None:
            statistics = file.with_name("memory.stat")
            caches = (f"{prefix}inactive_file", f"{prefix}active_file")
            return max(0, used - sum(_field(statistics, name) or 0 for name in caches))
    return 0


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # "max" means no limit
        return None


def _field(file: Path, name: str) -> int | None:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    for line in lines:
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return None
