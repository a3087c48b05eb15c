"""RUNPOD_SERVERLESS=false: the same deployment over HTTP, from the same entry point.

For load-balancing endpoints, pods and any host. Unlike `serve run` it ends with exit code 0 when
it is told to stop, and what runs then is finished; with 1 when the model is lost for good. How far
it is stands on PORT_HEALTH from the first moment.
"""

import logging
import signal
import threading
import time
from http.client import HTTPConnection, HTTPException
from typing import Any

from serve_app.cold_start.cold_start import ColdStart
from serve_app.config.settings import ConfigError, EntrySettings, Settings
from serve_app.errors import EngineDead, ServeError
from serve_app.loading.phases import read_events
from serve_app.node import cluster, phases, ray_node
from serve_app.node.banner import banner
from serve_app.node.health_listener import HealthListener, listen

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""Seconds between two looks at whether the deployment still answers."""
DRAIN_LOOK_S = 0.25
"""Seconds between two looks at whether the deployment is idle."""
ANSWER_S = 5.0
"""Seconds that the replicas have to say so."""
PING_S = 2.0
"""Seconds that a replica has to answer `/ping`; while there is none, Serve lets requests wait."""


class Door:
    """How far this server is. Made before all else: takes the signals, and opens PORT_HEALTH.

    loading <-> ready -> draining        (back to loading while Serve replaces a replica)
       |          |
       +----------+----> failed
    """

    def __init__(self, entry: EntrySettings) -> None:
        """For the main thread. Raises `ConfigError` where a port cannot be had."""
        self.status = "loading"
        self.load_log: str | None = None
        self.is_serving = False
        self._told_to_stop = threading.Event()
        if entry.port_health == entry.port:
            raise ConfigError(
                f"PORT_HEALTH and PORT are both {entry.port}; the health listener needs its own "
                "port."
            )
        listen("PORT", entry.port).close()  # Serve's proxy would say it in the middle of a trace
        if entry.port_health is not None:
            HealthListener(entry.port_health, self.health)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def health(self) -> dict[str, Any]:
        """`{"status", "load": [...]}` and the phase under way, as waiting jobs hear them."""
        events = read_events(self.load_log) if self.load_log else []
        return {"status": self.status, **phases.summary(events)}

    def watch(self, port: int) -> None:
        """Keeps `status` true until the signal to stop.

        Raises `ModelLoadFailed` when a replica has died and the model does not load again, and
        `EngineDead` when Ray itself has died, which nothing else would start again.
        """
        while not self._told_to_stop.wait(LOOK_S):
            if (lost := ray_node.lost()) is not None:
                raise EngineDead(f"The server lost {lost}, and ends.")
            is_ready = _answers(port)
            if self._told_to_stop.is_set():
                break
            if is_ready != (self.status == "ready"):
                self.status = "ready" if is_ready else "loading"
                log.warning("/ping on port %d: the server is %s.", port, self.status)
            if not is_ready and self.load_log:
                cluster.require_no_failure(self.load_log)
        self.status = "draining"

    def _stop(self, *_: Any) -> None:
        is_first = not self._told_to_stop.is_set()
        self._told_to_stop.set()
        self.status = "draining"
        if is_first and not self.is_serving:
            raise SystemExit(0)  # there is nobody to wait for


def run(settings: Settings, entry: EntrySettings, checked: list[str], door: Door) -> int:
    """Serves on 0.0.0.0:PORT until SIGTERM or SIGINT, then finishes what runs; 0."""
    for line in banner(settings, entry.serve_config, None, checked):
        log.info("%s", line)
    settings = cluster.with_load_log(settings)
    door.load_log = settings.load_log
    try:
        with ColdStart(settings).watch():
            handle = cluster.serve_http(settings, entry.serve_config, entry.port)
        door.is_serving, door.status = True, "ready"
        log.info("Serving HTTP on port %d.", entry.port)
        door.watch(entry.port)
        _drain(handle, settings.runpod.drain_s)
    except ServeError:
        door.status = "failed"
        raise
    finally:
        ray_node.stop()
    return 0


def _answers(port: int) -> bool:
    """Whether a request gets through the proxy to a replica with a living engine."""
    connection = HTTPConnection("127.0.0.1", port, timeout=PING_S)
    try:
        connection.request("GET", "/ping")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


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
            time.sleep(DRAIN_LOOK_S)
    except (RayError, RayServeException, TimeoutError) as error:
        log.warning("The deployment does not answer (%s); stopping at once.", type(error).__name__)


def _num_requests(handle: Any) -> int:
    """Requests that run or wait, on all replicas."""
    healths = handle.broadcast("health").results(timeout_s=ANSWER_S)
    return sum(health["engine"]["running"] + health["engine"]["waiting"] for health in healths)
