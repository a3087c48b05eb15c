"""The weight files, read into the page cache while Ray starts and torch is imported.

Plain reads, file after file, in the order in which the loader reads. Ends when the loader itself
begins to read, and where memory is short: pages read too early would push out others. Promises
nothing: whatever goes wrong here, the load finds out for itself.
"""

import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from serve_app.loading.phases import read_events
from serve_app.machine.host import free_bytes

log = logging.getLogger(__name__)

CHUNK_BYTES = 8 << 20
LOOK_BYTES = 64 << 20
"""Between two looks at whether to go on."""
SHARE = 0.5
"""Of the memory that is free when it begins: the rest is for those who load."""
SPARE_BYTES = 2_000_000_000
"""Free memory below which it stops."""


@contextlib.contextmanager
def while_starting(files: Sequence[Path], load_log: str | None) -> Iterator[None]:
    """Reads `files` in a thread until the block or the memory ends, or `load_log` says "read"."""
    stop = threading.Event()
    thread = threading.Thread(
        target=read, args=(files, load_log, stop), name="read-ahead", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        stop.set()  # not waited for: a read from a volume may hang


def read(files: Sequence[Path], load_log: str | None, stop: threading.Event) -> int:
    """Reads `files` as far as that makes sense; the number of bytes read."""
    budget, done, looked = int(free_bytes() * SHARE), 0, 0
    buffer = bytearray(CHUNK_BYTES)
    try:
        for file in files:
            with file.open("rb", buffering=0) as stream:
                while count := stream.readinto(buffer):
                    done += count
                    if stop.is_set():
                        return done
                    if done - looked >= LOOK_BYTES:
                        looked = done
                        if done > budget or free_bytes() < SPARE_BYTES or _is_read(load_log):
                            return done
    except OSError as error:
        log.debug("Reading ahead ended: %s", error.strerror)
    return done


def _is_read(load_log: str | None) -> bool:
    """Whether the loader has begun to read the weights itself."""
    events = read_events(load_log) if load_log is not None else []
    return any(event.phase.reads_weights for event in events)
