"""Finds and kills the descendants of this process, and makes the kernel end them with it.

It uses psutil, and two options of prctl(2) of Linux that psutil lacks.
"""

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

KILL_LIMIT_S = 10.0
"""Maximum seconds for a killed process to end. Releasing a GPU's memory may take several."""
KILL_POLL_S = 0.02
"""Seconds between two checks for remaining processes."""


def is_alive(process: psutil.Process) -> bool:
    """Returns whether the process runs. False for a zombie, and for a later process with the same
    id."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def command(process: psutil.Process) -> str:
    """Returns the command line, or the title that the process has set; "" after it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def own_age_s() -> float:
    """Returns the seconds since this process was started, within a clock tick (10 ms).

    Field 22 of /proc/self/stat is the start in ticks since boot (proc(5)). psutil adds the time of
    boot, which Linux rounds to a whole second.
    """
    _, _, fields = Path("/proc/self/stat").read_bytes().rpartition(b")")
    started_s = int(fields.split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_s


def started_at(pid: int) -> float | None:
    """Returns the start time of process `pid`, in seconds since the epoch; None if there is
    none."""
    try:
        return float(psutil.Process(pid).create_time())
    except psutil.Error:
        return None


def descendants(pid: int | None = None) -> list[psutil.Process]:
    """Returns every living process below `pid`, by default below this one."""
    try:
        return [
            process for process in psutil.Process(pid).children(recursive=True) if is_alive(process)
        ]
    except psutil.NoSuchProcess:
        return []


def kill(
    find: Callable[[], list[psutil.Process]], limit_s: float = KILL_LIMIT_S
) -> list[psutil.Process]:
    """Kills the processes that `find` returns until there are none, for at most `limit_s` seconds.

    Returns the remaining processes.
    """
    killed: set[psutil.Process] = set()
    deadline = time.monotonic() + limit_s
    while (remaining := find()) and time.monotonic() < deadline:
        _send_kill(remaining)
        killed.update(remaining)
        # Also reaps those that this process has adopted.
        psutil.wait_procs(killed, timeout=KILL_POLL_S)
    return remaining


def _send_kill(targets: Iterable[psutil.Process]) -> None:
    for process in targets:
        with contextlib.suppress(psutil.Error):
            process.kill()


def adopt_orphans() -> None:
    """Makes descendants whose parent dies children of this process from now on."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def end_forks_with_this() -> None:
    """Makes the kernel kill forks of this process when it dies for any reason, from now on.

    RunPod's heartbeat is such a fork: it would otherwise continue to report a healthy worker.
    SIGTERM ends the forks at once. Processes that are started in another way are not affected.
    """
    parent = os.getpid()
    _prctl(PR_SET_PDEATHSIG, 0)  # loads what the fork needs

    def in_child() -> None:
        # The parent's handler drains jobs, which a fork must not do.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent died before the line above
            os._exit(1)

    os.register_at_fork(after_in_child=in_child)


def block_alarms() -> None:
    """Blocks SIGALRM in this thread and in threads that it starts from now on.

    If a signal arrives while Ray starts, Ray's C++ handler sets an alarm that aborts the process
    3 s later, and raises the signal again for Python's handler. Call this function before any other
    thread starts, because an alarm reaches any thread that does not block it.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})


def _prctl(option: int, value: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if library.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")
