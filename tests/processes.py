"""Finds the processes below another one, and checks whether they are gone later."""

from contextlib import suppress

import psutil


def all_below(pid: int) -> set[psutil.Process]:
    """Returns every living process below `pid`. psutil compares processes by number and start
    time."""
    with suppress(psutil.NoSuchProcess):
        return {child for child in psutil.Process(pid).children(recursive=True) if _runs(child)}
    return set()


def running() -> set[psutil.Process]:
    """Returns every living process."""
    return {process for process in psutil.process_iter() if _runs(process)}


def _runs(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD))
    return False


def descendants(pid: int) -> dict[int, str]:
    """Returns pid and command line of every running process below `pid`."""
    found = {}
    for child in all_below(pid):
        with suppress(psutil.NoSuchProcess):
            found[child.pid] = " ".join(child.cmdline())
    return found


def ray_below(pid: int) -> set[psutil.Process]:
    """Ray's processes below `pid`, with their children."""
    titles = descendants(pid)
    # A worker process runs `ray_worker.py` until it registers with Ray, which renames it.
    parts = ("ray::", "/ray/", "/node/ray_worker.py")
    rays = {child for child, title in titles.items() if any(part in title for part in parts)}
    children = {child.pid for ray in rays for child in all_below(ray)}
    return {child for child in all_below(pid) if child.pid in rays | children}


def one_below(pid: int, words: str) -> int:
    """Returns the one process below `pid` whose command line holds `words`."""
    (found,) = [child for child, title in descendants(pid).items() if words in title]
    return found


def replica_of(pid: int) -> int:
    """Returns the process of the replica below `pid`."""
    return one_below(pid, "ServeReplica:mixtral")
