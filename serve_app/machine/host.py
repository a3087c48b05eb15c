"""The main memory of this machine, as /proc and the container's limits (cgroups) tell of it."""

from pathlib import Path

from serve_app.config.settings import ConfigError

CGROUP = Path("/sys/fs/cgroup")


def free_bytes(cgroup: Path = CGROUP) -> int:
    """What new processes can have without swapping, and without the container being killed."""
    free = _meminfo("MemAvailable")
    if (limit := limit_bytes(cgroup)) is not None:
        free = min(free, max(0, limit - _held(cgroup)))
    return free


def limit_bytes(cgroup: Path = CGROUP) -> int | None:
    """The container's memory limit; None where it has none below the machine's memory."""
    for file in (cgroup / "memory.max", cgroup / "memory" / "memory.limit_in_bytes"):
        if (limit := _number(file)) is not None and limit < _meminfo("MemTotal"):
            return limit
    return None


def num_oom_kills(cgroup: Path = CGROUP) -> int:
    """Processes of this container that the kernel has killed for want of memory, so far."""
    for file in (cgroup / "memory.events", cgroup / "memory" / "memory.oom_control"):
        if (count := _field(file, "oom_kill")) is not None:
            return count
    return 0


def _held(cgroup: Path) -> int:
    """What the container holds, without the page cache, which the kernel takes back."""
    for file, cached in (
        (cgroup / "memory.current", "inactive_file"),
        (cgroup / "memory" / "memory.usage_in_bytes", "total_inactive_file"),
    ):
        if (used := _number(file)) is not None:
            statistics = file.with_name("memory.stat")
            active = cached.replace("inactive", "active")
            caches = (_field(statistics, name) or 0 for name in (cached, active))
            return max(0, used - sum(caches))
    return 0


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # "max" is no limit
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


def _meminfo(name: str) -> int:
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ConfigError(f"/proc/meminfo has no {name} line; this needs Linux.")
