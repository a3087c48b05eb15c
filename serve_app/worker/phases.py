"""The phases that another process writes into the load log, in this process's log as they end.

A short line each, because the platform drops lines from chatty logs. Knows not what they are.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from serve_app.load_log import PHASE_LINE, read_lines

log = logging.getLogger(__name__)

LOOK_S = 0.25
"""Seconds between two looks into the load log."""


def process_age_s() -> float:
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


@contextlib.contextmanager
def logged(path: str | None) -> Iterator[None]:
    """Logs each phase that ends in the load log `path` while the block runs."""
    if path is None:
        yield
        return
    is_over = threading.Event()
    num_before = len(read_lines(path))

    def follow() -> None:
        num_seen, is_last = num_before, False
        while not is_last:
            is_last = is_over.wait(LOOK_S)
            lines = read_lines(path)
            for line in lines[num_seen:]:
                if line["state"] == "done":
                    log.info(PHASE_LINE, line["phase"], line["seconds"])
            num_seen = len(lines)

    thread = threading.Thread(target=follow, name="phases", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
