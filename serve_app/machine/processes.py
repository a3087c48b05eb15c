"""Finds and kills the descendants of this process, and makes the kernel end them with it.

psutil does the finding; two prctl(2) options of Linux, which psutil lacks, do the rest.
"""

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterable

import psutil

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

KILL_LIMIT_S = 10.0
"""A killed process may need seconds to release a GPU's memory."""
KILL_POLL_S = 0.02
"""Seconds between two looks at which killed processes are left."""


def is_alive(process: psutil.Process) -> bool:
    """Returns False for a zombie too, and for a later process with the same number."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def command(process: psutil.Process) -> str:
    """Returns the command line, or the title that the process has given itself; "" once it has
    ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def own_age_s() -> float:
    """Seconds since this process was started."""
    return max(0.0, time.time() - float(psutil.Process().create_time()))


def started_at(pid: int) -> float | None:
    """When process `pid` was started, in seconds since the epoch; None if there is none."""
    try:
        return float(psutil.Process(pid).create_time())
    except psutil.Error:
        return None


def descendants(pid: int | None = None) -> list[psutil.Process]:
    """Returns every living process below `pid`, by default below this one."""
    try:
        return [it for it in psutil.Process(pid).children(recursive=True) if is_alive(it)]
    except psutil.NoSuchProcess:
        return []


def kill(
    find: Callable[[], list[psutil.Process]], limit_s: float = KILL_LIMIT_S
) -> list[psutil.Process]:
    """Kills what `find` returns until it returns nothing; what is left after `limit_s` seconds."""
    killed: set[psutil.Process] = set()
    deadline = time.monotonic() + limit_s
    while (left := find()) and time.monotonic() < deadline:
        _send_kill(left)
        killed.update(left)
        # Also reaps those that this process has adopted.
        psutil.wait_procs(killed, timeout=KILL_POLL_S)
    return left


def _send_kill(found: Iterable[psutil.Process]) -> None:
    for process in found:
        with contextlib.suppress(psutil.Error):
            process.kill()


def adopt_orphans() -> None:
    """From now on, a descendant whose parent dies becomes a child of this process."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def end_forks_with_this() -> None:
    """From now on, the kernel kills forks of this process when it dies, in whatever way it dies.

    RunPod's heartbeat is such a fork: left alone, it would go on reporting a healthy worker.
    SIGTERM ends the forks at once. Processes started in another way are not affected.
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
    """Keeps SIGALRM from this thread and from those that it starts from now on.

    A signal that comes while Ray starts reaches Ray's C++ handler first, which sets an alarm that
    aborts the process 3 s later, and then raises the signal again for Python's handler. Call this
    before any other thread starts, or one of those gets the alarm.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})


def _prctl(option: int, value: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if library.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")
