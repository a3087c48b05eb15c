"""Runs a function in a thread that observes a start until it ends."""

import contextlib
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def following(name: str, follow: Callable[[threading.Event], None]) -> Iterator[None]:
    """Runs `follow(is_over)` in a thread called `name` while the block runs, and waits for its end.

    The block's end sets `is_over`, after which `follow` must return soon.
    """
    is_over = threading.Event()
    thread = threading.Thread(target=follow, args=(is_over,), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
