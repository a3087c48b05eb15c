"""Follows how many replicas are ready while the others load.

Serve sends requests to the first replica as soon as it is ready, and ends the deployment of an
application when all of them are.
"""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator

from serve_app.node.follower import following

log = logging.getLogger(__name__)

POLL_S = 1.0
"""Seconds between two queries of Serve's controller."""


@contextlib.contextmanager
def logged(
    num_ready: Callable[[], int], num_replicas: int, on_first: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Logs each change of `num_ready()` while the block runs, and that all are ready after it.

    Calls `on_first` in a thread when the first one is ready. Does nothing if there is one replica.
    """
    if num_replicas == 1:
        yield
        return

    def follow(is_over: threading.Event) -> None:
        num_seen = 0
        while not is_over.wait(POLL_S):
            if (num := num_ready()) != num_seen:
                log.info("%d of %d replicas are ready.", num, num_replicas)
                if num_seen == 0:
                    on_first()
                num_seen = num

    with following("ready-replicas", follow):
        yield
    log.info("All %d replicas are ready.", num_replicas)
