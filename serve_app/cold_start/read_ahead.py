"""Reads the weight files into the page cache while Ray starts and torch is imported.

Reads the files in the order of the loader. Stops when the loader begins to read, or if little
memory is free, because the pages would evict others. Errors are only logged, because the load will
raise them too.
"""

import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from serve_app.loading.phases import read_events
from serve_app.machine.host import free_bytes

log = logging.getLogger(__name__)

BUFFER_BYTES = 8 << 20
CHECK_BYTES = 64 << 20
"""Number of bytes between two checks whether to continue."""
MAX_SHARE = 0.5
"""Maximum share of the free memory that is filled; the rest is left for the load."""
MIN_FREE_BYTES = 2_000_000_000
"""Free memory in bytes below which reading stops."""


@contextlib.contextmanager
def while_starting(files: Sequence[Path], load_log: str | None) -> Iterator[None]:
    """Reads `files` in a thread while the block runs. `load_log` is the file of the load's
    events."""
    stop = threading.Event()
    thread = threading.Thread(
        target=read, args=(files, load_log, stop), name="read-ahead", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        stop.set()  # no join, because a read from a volume may hang


def read(files: Sequence[Path], load_log: str | None, stop: threading.Event) -> int:
    """Reads `files` until `stop` is set, the loader reads, or memory is short. Returns the number
    of bytes read."""
    budget, num_bytes, checked_bytes = int(free_bytes() * MAX_SHARE), 0, 0
    buffer = bytearray(BUFFER_BYTES)
    try:
        for file in files:
            with file.open("rb", buffering=0) as stream:
                while count := stream.readinto(buffer):
                    num_bytes += count
                    if stop.is_set():
                        return num_bytes
                    if num_bytes - checked_bytes >= CHECK_BYTES:
                        checked_bytes = num_bytes
                        is_short = num_bytes > budget or free_bytes() < MIN_FREE_BYTES
                        if is_short or _loader_reads(load_log):
                            return num_bytes
    except OSError as error:
        log.debug("Reading ahead stopped: %s", error.strerror)
    return num_bytes


def _loader_reads(load_log: str | None) -> bool:
    """Returns whether the loader has begun to read the weights."""
    events = read_events(load_log) if load_log is not None else []
    return any(event.phase.reads_weights for event in events)
