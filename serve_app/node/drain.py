"""Finishes running requests before the server stops."""

import logging
import time
from typing import Any

from serve_app.machine.ports import has_unsent

log = logging.getLogger(__name__)

IDLE_POLL_S = 0.25
"""Seconds between two polls for running requests, while the server drains."""
REPLICA_TIMEOUT_S = 5.0
"""Maximum seconds for the replicas to answer a call while the server drains."""


def drain(handle: Any, limit_s: float, port: int) -> None:
    """Refuses new requests and waits at most `limit_s` seconds for running ones.

    A request runs until its client has read the answer, which it does through `port`.
    """
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    end = time.monotonic() + limit_s
    log.info("Finishing running requests for at most %g s. New requests are refused.", limit_s)
    try:
        handle.broadcast("drain").results(timeout_s=REPLICA_TIMEOUT_S)
        num_idle, is_late = 0, False
        # Twice, because an answer takes a moment from the replica to the proxy and to the socket.
        while num_idle < 2:
            if time.monotonic() > end and not is_late:
                log.warning(
                    "Some requests are still running after %g s; they get status 503.", limit_s
                )
                handle.broadcast("end_requests").results(timeout_s=REPLICA_TIMEOUT_S)
                is_late = True
            if time.monotonic() > end + REPLICA_TIMEOUT_S:
                return
            num_idle = 0 if _num_requests(handle) or has_unsent(port) else num_idle + 1
            time.sleep(IDLE_POLL_S)
    except (RayError, RayServeException, TimeoutError) as error:
        log.warning(
            "The deployment does not answer (%s); the server stops now.", type(error).__name__
        )


def _num_requests(handle: Any) -> int:
    """Returns the number of running and waiting requests on all replicas."""
    healths = handle.broadcast("health").results(timeout_s=REPLICA_TIMEOUT_S)
    return sum(health["engine"]["running"] + health["engine"]["waiting"] for health in healths)
