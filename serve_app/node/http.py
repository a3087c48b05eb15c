"""Serves the deployment over HTTP until this process is stopped.

Both `mixtral-serve run` and `runpod_entry.py` with RUNPOD_SERVERLESS=false end here. SIGTERM and
Ctrl-C finish the running requests and exit with code 0; the exit code is 1 when the model is lost
and cannot be loaded again. `PORT_HEALTH` answers from the first moment, before Ray starts.
"""

import json
import logging
import signal
import ssl
import threading
import time
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any

from serve_app.cold_start.check import Checked
from serve_app.cold_start.cold_start import ColdStart
from serve_app.config.settings import ConfigError, Settings
from serve_app.errors import EngineDead, ServeError
from serve_app.loading.phases import read_events
from serve_app.machine.ports import require_free
from serve_app.node import cluster, phases, ray_node
from serve_app.node.health_listener import HealthListener

log = logging.getLogger(__name__)

PING_INTERVAL_S = 1.0
"""Seconds between two requests for `/ping`, once the deployment serves."""
IDLE_POLL_S = 0.25
"""Seconds between two polls for running requests, while the server drains."""
REPLICA_TIMEOUT_S = 5.0
"""Seconds that the replicas have to answer such a poll."""
PING_TIMEOUT_S = 2.0
"""Seconds that `/ping` has to answer. Serve makes requests wait while no replica runs."""
ALL_INTERFACES = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Addresses that stand for every interface, and where a client on this machine connects."""


class HttpEndpoint:
    """The state of this server, its signals, and the port of its health listener.

    loading <-> ready -> draining        (back to loading while Serve replaces a replica)
       |          |
       +----------+----> failed
    """

    def __init__(
        self, http_options: dict[str, Any], port_health: int | None = None, port_name: str = "PORT"
    ) -> None:
        """Takes SIGTERM and SIGINT, so call it in the main thread, before anything else.

        `http_options` are Ray Serve's, with at least `host` and `port`. Raises `ConfigError` for a
        port that is in use, naming `port_name` or PORT_HEALTH.
        """
        self.http_options = http_options
        self.status = "loading"
        self.load_log: str | None = None
        self.is_serving = False
        self._is_stopping = threading.Event()
        if port_health == http_options["port"]:
            raise ConfigError(
                f"PORT_HEALTH and {port_name} are both {port_health}; the health listener needs "
                "its own port."
            )
        # Serve's proxy would report a port in use in the middle of a stack trace.
        require_free(port_name, http_options["port"], http_options["host"])
        if port_health is not None:
            HealthListener(port_health, self.health)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    @property
    def url(self) -> str:
        """Where a client on this machine reaches the server."""
        host = self.http_options["host"]
        scheme = "https" if self.http_options.get("ssl_certfile") else "http"
        return f"{scheme}://{ALL_INTERFACES.get(host, host)}:{self.http_options['port']}"

    def health(self) -> dict[str, Any]:
        """`{"status", "load": [...]}` and the phase under way, as waiting jobs get them."""
        events = read_events(self.load_log) if self.load_log else []
        return {"status": self.status, **phases.summary(events)}

    def watch(self) -> None:
        """Keeps `status` up to date until a signal stops the server.

        Raises `ModelLoadFailed` when a replica has died and the model does not load again, and
        `EngineDead` when Ray itself has died, which Serve cannot repair.
        """
        while not self._is_stopping.wait(PING_INTERVAL_S):
            if (lost := ray_node.lost()) is not None:
                raise EngineDead(f"The server lost {lost}, and ends.")
            is_ready = self._answers()
            if self._is_stopping.is_set():
                break
            if is_ready != (self.status == "ready"):
                self.status = "ready" if is_ready else "loading"
                log.warning("%s/ping: the server is %s.", self.url, self.status)
            if not is_ready and self.load_log:
                cluster.require_no_failure(self.load_log)
        self.status = "draining"

    def _answers(self) -> bool:
        """Whether a request passes the proxy to a replica with a living engine."""
        connection = self._connect()
        try:
            connection.request("GET", "/ping")
            return connection.getresponse().status == 200
        except (OSError, HTTPException):
            return False
        finally:
            connection.close()

    def _connect(self) -> HTTPConnection:
        scheme, _, address = self.url.partition("://")
        host, _, port = address.rpartition(":")
        if scheme == "http":
            return HTTPConnection(host, int(port), timeout=PING_TIMEOUT_S)
        # The certificate names the public host, and this is our own server.
        context = ssl._create_unverified_context()
        return HTTPSConnection(host, int(port), timeout=PING_TIMEOUT_S, context=context)

    def _stop(self, number: int, _frame: Any) -> None:
        is_first = not self._is_stopping.is_set()
        self._is_stopping.set()
        self.status = "draining"
        if is_first and not self.is_serving:
            raise SystemExit(0)  # no request to wait for
        if not is_first and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait for running requests


def run(checked: Checked, config: str | Path, endpoint: HttpEndpoint) -> int:
    """Serves `config` until SIGTERM or Ctrl-C, then finishes running requests; 0."""
    settings = cluster.with_load_log(checked.settings)
    endpoint.load_log = settings.load_log
    try:
        with ColdStart(settings, checked.plan).watch():
            handle = cluster.serve_http(settings, config, endpoint.http_options, checked.plan)
        endpoint.is_serving, endpoint.status = True, "ready"
        log.info("Serving HTTP on %s; try: %s", endpoint.url, example(endpoint.url, settings))
        endpoint.watch()
        _drain(handle, settings.runpod.drain_s)
    except ServeError:
        endpoint.status = "failed"
        raise
    finally:
        ray_node.stop()
    return 0


def example(url: str, settings: Settings) -> str:
    """A command for a shell on this machine that asks the server at `url`."""
    insecure = "-k " if url.startswith("https:") else ""  # the certificate names the public host
    key = "-H 'Authorization: Bearer KEY' " if settings.api.keys is not None else ""
    body = json.dumps({"prompt": "What is the capital of France?"})
    return f"curl {insecure}{key}{url}/prompt -d '{body}'"


def _drain(handle: Any, limit_s: float) -> None:
    """Refuses new requests and waits at most `limit_s` seconds for running ones."""
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    end = time.monotonic() + limit_s
    log.info("Finishing running requests, for %g s at most; new ones are refused.", limit_s)
    try:
        handle.broadcast("drain").results(timeout_s=REPLICA_TIMEOUT_S)
        num_idle = 0
        # Twice, because the last token of an answer takes a moment to reach its client.
        while num_idle < 2:
            if time.monotonic() > end:
                log.warning("Some requests still run after %g s; they are cancelled.", limit_s)
                return
            num_idle = 0 if _num_requests(handle) else num_idle + 1
            time.sleep(IDLE_POLL_S)
    except (RayError, RayServeException, TimeoutError) as error:
        log.warning("The deployment does not answer (%s); stopping at once.", type(error).__name__)


def _num_requests(handle: Any) -> int:
    """Running and waiting requests on all replicas."""
    healths = handle.broadcast("health").results(timeout_s=REPLICA_TIMEOUT_S)
    return sum(health["engine"]["running"] + health["engine"]["waiting"] for health in healths)
