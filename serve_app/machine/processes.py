"""The processes below this one: found by what they run, since when, and none outlives it.

Linux only, by /proc and prctl. Knows no Ray and no RunPod.
"""

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

END_S = 10.0
"""A killed process may take a while to give back a GPU's memory."""
LOOK_S = 0.02


@dataclass(frozen=True)
class Process:
    """A process as /proc shows it; `started` tells it from a later one with its number."""

    pid: int
    parent: int
    started: str
    command: str


def read(pid: int) -> Process | None:
    """The living process `pid`; None where there is none, or only its exit code."""
    folder = Path("/proc") / str(pid)
    try:
        # "pid (name) state ppid ...", where the name may hold anything
        fields = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
        command = (folder / "cmdline").read_text(errors="replace").replace("\0", " ")
    except OSError:
        return None
    return None if fields[0] in "ZX" else Process(pid, int(fields[1]), fields[19], command)


def own_age_s() -> float:
    """Seconds since this process was started."""
    began = (started_at(os.getpid()) or 0) / os.sysconf("SC_CLK_TCK")
    return float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0]) - began


def started_at(pid: int) -> int | None:
    """When process `pid` was started, in clock ticks since the machine was; None: there is none.

    proc(5): field 22 of stat, counted behind the name, which may hold anything.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[19])


def is_alive(process: Process) -> bool:
    now = read(process.pid)
    return now is not None and now.started == process.started


def below(pid: int | None = None) -> list[Process]:
    """Every living process below `pid`, or below this one."""
    top = os.getpid() if pid is None else pid
    names = (folder.name for folder in Path("/proc").iterdir())
    every = [it for name in names if name.isdigit() and (it := read(int(name))) is not None]
    found: list[Process] = []
    reached = {top}
    while news := [it for it in every if it.parent in reached and it.pid not in reached]:
        found += news
        reached |= {it.pid for it in news}
    return found


def end(find: Callable[[], list[Process]], limit_s: float = END_S) -> list[Process]:
    """Kills what `find` finds until it finds nothing; what is left after `limit_s` seconds."""
    killed: set[int] = set()
    until = time.monotonic() + limit_s
    while (left := find()) and time.monotonic() < until:
        for process in left:
            with contextlib.suppress(OSError):
                os.kill(process.pid, signal.SIGKILL)
            killed.add(process.pid)
        time.sleep(LOOK_S)
        for pid in killed:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)  # those that this process has adopted
    return left


def adopt_orphans() -> None:
    """From now on a process whose parent has died is still below this one."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def end_forks_with_this() -> None:
    """From now on the kernel kills the forks of this process when it dies, however it dies.

    RunPod's heartbeat is such a fork: it would tell the platform for ever that the worker is well.
    SIGTERM ends them at once. Processes that are started in another way are not affected.
    """
    parent = os.getpid()
    _prctl(PR_SET_PDEATHSIG, 0)  # loads what the fork needs

    def in_child() -> None:
        # What this process does then, and says, is about its jobs.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it has died already
            os._exit(1)

    os.register_at_fork(after_in_child=in_child)


def _prctl(option: int, value: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if library.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")
