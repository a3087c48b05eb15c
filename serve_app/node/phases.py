"""The phases that another process writes into the load log, as this one tells of them.

In its own log, a short line as each ends, because the platform drops lines from chatty logs; and
to clients, as a summary. Knows not what the phases are, nor who asks.
"""

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import Any

from serve_app.loading.load_log import PHASE_LINE, read_lines

log = logging.getLogger(__name__)

LOOK_S = 0.25
"""Seconds between two looks into the load log."""


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


def summary(written: list[dict[str, Any]]) -> dict[str, Any]:
    """Lines of the load log, as clients hear them.

    `{"load": [{"phase", "seconds"} of each finished one], "phase": the one under way}`, and where
    it is known how far that is, `"done"` from 0 to 1, `"progress"` in percent, and a `"message"`.
    """
    told: dict[str, Any] = {
        "load": [
            {"phase": line["phase"], "seconds": line["seconds"]}
            for line in written
            if line["state"] == "done"
        ]
    }
    if not written or written[-1]["state"] not in ("started", "running"):
        return told
    last = written[-1]
    told["phase"] = last["phase"]
    if "done" in last:
        percent = int(100 * last["done"])
        message = f"{last['phase']}: {percent} %"
        if "bytes" in last:
            size = last["bytes"]
            message += f", {last['done'] * size / 1e9:.2f} of {size / 1e9:.2f} GB"
        told |= {"done": last["done"], "progress": percent, "message": message}
    return told
