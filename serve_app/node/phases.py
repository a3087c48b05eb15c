"""Reads the load log of a replica, for this process's own log and for clients.

This process logs one short line per finished phase, because RunPod drops lines of a log that grows
fast.
"""

import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from serve_app.loading.load_log import log_phase
from serve_app.loading.phases import Done, Event, Running, Started, finished, read_events
from serve_app.node.follower import following

log = logging.getLogger(__name__)

LOAD_LOG_POLL_S = 0.25
"""Seconds between two reads of the load log."""


@contextlib.contextmanager
def logged(path: str | None) -> Iterator[None]:
    """Logs each phase that ends in the load log `path` while the block runs."""
    if path is None:
        yield
        return
    num_before = len(read_events(path))

    def follow(is_over: threading.Event) -> None:
        num_seen, is_last = num_before, False
        while not is_last:
            is_last = is_over.wait(LOAD_LOG_POLL_S)
            events = read_events(path)
            for event in events[num_seen:]:
                if isinstance(event, Done):
                    log_phase(log, event)
            num_seen = len(events)

    with following("phases", follow):
        yield


def summary(events: Sequence[Event]) -> dict[str, Any]:
    """Returns the state of a load for clients.

    It is `{"load": [{"phase", "seconds"} of each finished phase], "phase": the current one}`. If
    its progress is known, it also has `"done"` from 0 to 1, `"progress"` in percent, and
    `"message"`.
    """
    state: dict[str, Any] = {"load": finished(events)}
    match events[-1] if events else None:
        case Started(phase=phase):
            state["phase"] = phase.value
        case Running(phase=phase, done=done, bytes=size):
            percent = int(100 * done)
            message = f"{phase}: {percent} %"
            if size is not None:
                message += f", {done * size / 1e9:.2f} of {size / 1e9:.2f} GB"
            state |= {"phase": phase.value, "done": done, "progress": percent, "message": message}
    return state
