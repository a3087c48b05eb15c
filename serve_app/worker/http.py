"""RUNPOD_SERVERLESS=false: the same deployment over HTTP, from the same entry point.

For load-balancing endpoints, pods and any host. Unlike `serve run` it ends with exit code 0 when
it is told to stop, and what runs then is finished.
"""

import logging
import signal
import threading
import time
from typing import Any

from serve_app.settings import ConfigError, EntrySettings, Settings
from serve_app.worker import cluster
from serve_app.worker.banner import banner

log = logging.getLogger(__name__)

LOOK_S = 0.25
"""Seconds between two looks at whether the deployment is idle."""
ANSWER_S = 5.0
"""Seconds that the replicas have to say so."""


def run(settings: Settings, entry: EntrySettings, checked: list[str]) -> int:
    """Serves on 0.0.0.0:PORT until SIGTERM or SIGINT, then finishes what runs; 0."""
    if entry.port_health == entry.port:
        raise ConfigError(
            f"PORT_HEALTH and PORT are both {entry.port}; the health listener needs its own port."
        )
    if entry.port_health is not None:
        log.warning("PORT_HEALTH is not served yet; /ping on PORT answers once the model is there.")
    for line in banner(settings, entry.serve_config, None, checked):
        log.info("%s", line)
    is_serving, told_to_stop = threading.Event(), threading.Event()

    def stop(*_: Any) -> None:
        is_first = not told_to_stop.is_set()
        told_to_stop.set()
        if is_first and not is_serving.is_set():
            raise SystemExit(0)  # there is nobody to wait for

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        handle = cluster.serve_http(settings, entry.serve_config, entry.port)
        is_serving.set()
        log.info("Serving HTTP on port %d.", entry.port)
        told_to_stop.wait()
        _drain(handle, settings.runpod.drain_s)
    finally:
        cluster.stop()
    return 0


def _drain(handle: Any, limit_s: float) -> None:
    """Refuses what comes and waits for what runs, `limit_s` seconds at most."""
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    end = time.monotonic() + limit_s
    log.info("Finishing what runs, for %g s at most; new requests are refused.", limit_s)
    try:
        handle.broadcast("drain").results(timeout_s=ANSWER_S)
        num_idle = 0
        # Twice, because the last token of an answer takes a moment to reach its client.
        while num_idle < 2:
            if time.monotonic() > end:
                log.warning("Some requests still run after %g s; they are cut off.", limit_s)
                return
            num_idle = 0 if _num_requests(handle) else num_idle + 1
            time.sleep(LOOK_S)
    except (RayError, RayServeException, TimeoutError) as error:
        log.warning("The deployment does not answer (%s); stopping at once.", type(error).__name__)


def _num_requests(handle: Any) -> int:
    """Requests that run or wait, on all replicas."""
    healths = handle.broadcast("health").results(timeout_s=ANSWER_S)
    return sum(health["engine"]["running"] + health["engine"]["waiting"] for health in healths)
