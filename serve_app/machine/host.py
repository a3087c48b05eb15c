"""Free main memory and cores of this machine, within the container's limits.

psutil reports the memory of the whole machine, and the affinity mask contains all its cores. The
container's limits and its out-of-memory kills are in the files of its cgroup (Linux:
Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst and scheduler/sched-bwc.rst).
"""

import os
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")


def free_bytes(cgroup: Path = CGROUP) -> int:
    """Returns the bytes that new processes can use without swapping and within the container's
    limit."""
    free: int = psutil.virtual_memory().available
    if (limit := limit_bytes(cgroup)) is not None:
        free = min(free, max(0, limit - _held_bytes(cgroup)))
    return free


def limit_bytes(cgroup: Path = CGROUP) -> int | None:
    """Returns the container's memory limit in bytes; None if it is not below the machine's
    memory."""
    for file in (cgroup / "memory.max", cgroup / "memory" / "memory.limit_in_bytes"):
        if (limit := _number(file)) is not None and limit < psutil.virtual_memory().total:
            return limit
    return None


def num_cores(cgroup: Path = CGROUP) -> int:
    """Returns the number of cores that this process may use at once, at least 1.

    A container with a limit of 1.5 cores gets 1: with more threads the kernel would stop all of
    them for a part of each period.
    """
    cores = len(os.sched_getaffinity(0))
    quota = _number(cgroup / "cpu" / "cpu.cfs_quota_us")
    period = _number(cgroup / "cpu" / "cpu.cfs_period_us")
    if (limit := _words(cgroup / "cpu.max")) and limit[0] != "max":
        quota, period = int(limit[0]), int(limit[1])
    if quota and period and quota > 0:  # -1 means no limit
        cores = min(cores, quota // period)
    return max(1, cores)


def num_oom_kills(cgroup: Path = CGROUP) -> int:
    """Returns the number of this container's processes that the out-of-memory killer has killed so
    far."""
    for file in (cgroup / "memory.events", cgroup / "memory" / "memory.oom_control"):
        if (count := _field(file, "oom_kill")) is not None:
            return count
    return 0


def _held_bytes(cgroup: Path) -> int:
    """Returns the container's memory without its page cache, which the kernel reclaims on
    demand."""
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


def _words(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").split()
    except OSError:
        return []


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
