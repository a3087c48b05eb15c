"""Serves the deployment over HTTP until this process is stopped.

Both `mixtral-serve run` and `runpod_entry.py` with RUNPOD_SERVERLESS=false call `run`. After
SIGTERM or Ctrl-C, running requests finish and the exit code is 0; it is 1 if the model dies and
cannot be loaded again. `/ping` has an answer from the beginning, before Ray starts: on PORT_HEALTH,
or on the server's own port, which Serve's proxy takes over when the first replica is ready.
"""

import json
import logging
import signal
import ssl
import sys
import threading
import time
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any

from serve_app.cold_start.check import Checked
from serve_app.cold_start.cold_start import ColdStart
from serve_app.config.settings import Settings
from serve_app.errors import EngineDead, ServeError
from serve_app.machine.ports import free_port, has_unsent, require_free
from serve_app.node import cluster, ray_node, ray_processes
from serve_app.node.haproxy import Proxy
from serve_app.node.health_listener import HealthListener
from serve_app.node.health_server import State

log = logging.getLogger(__name__)

PING_INTERVAL_S = 1.0
"""Seconds between two requests for `/ping`, once the deployment serves."""
IDLE_POLL_S = 0.25
"""Seconds between two polls for running requests, while the server drains."""
REPLICA_TIMEOUT_S = 5.0
"""Maximum seconds for the replicas to answer a call while the server drains."""
PING_TIMEOUT_S = 2.0
"""Maximum seconds for `/ping` to answer. Serve makes requests wait while no replica runs."""
HAND_OVER_S = 10.0
"""Maximum seconds for Serve's proxy to answer after the model is loaded."""
HAND_OVER_POLL_S = 0.05
BEHIND = "127.0.0.2"
"""An address of this machine that no interface lists, so `listen_before` leaves it to Serve."""
ALL_INTERFACES = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Addresses that mean every interface, and the address with which a client on this machine
connects."""


class HttpEndpoint:
    """The state of this server, its signals, and the port of its health listener.

    loading <-> ready -> draining        (back to loading while Serve replaces a replica)
       |          |
       +----------+----> failed
    """

    def __init__(
        self, http_options: dict[str, Any], port_health: int | None = None, port_name: str = "PORT"
    ) -> None:
        """Installs handlers of SIGTERM and SIGINT. Call it in the main thread, before anything
        else.

        If `port_health` is None or the server's own port, `/ping` is on the server's port.
        `http_options` are Ray Serve's, with at least `host` and `port`. Raises `ConfigError`, which
        names `port_name` or PORT_HEALTH, if a port is in use.
        """
        if http_options["port"] == 0:
            http_options = http_options | {"port": free_port(http_options["host"])}
        self.http_options = http_options
        self.proxy = Proxy(http_options)
        self.status = "loading"
        self.load_log: str | None = None
        self.allowed_origins: list[str] = []
        """The setting; `tell` passes it on."""
        self.is_serving = False
        """Whether a replica is ready."""
        self.is_deployed = False
        """Whether all replicas are ready."""
        self._is_stopping = threading.Event()
        port = http_options["port"]
        # Serve's proxy would report a port in use in the middle of a stack trace.
        require_free(port_name, port, http_options["host"])
        self._has_own_port = port_health is not None and port_health != port
        self._health: HealthListener | None = None
        if port_health is not None and self._has_own_port:
            self._health = HealthListener.on_port(port_health)
        elif _can_stand_in(http_options):
            self._health = HealthListener.before(port)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    @property
    def url(self) -> str:
        """The URL of the server for clients on this machine."""
        host = self.http_options["host"]
        scheme = "https" if self.http_options.get("ssl_certfile") else "http"
        return f"{scheme}://{ALL_INTERFACES.get(host, host)}:{self.http_options['port']}"

    def tell(self, status: str | None = None, load_log: str | None = None) -> None:
        """Changes the status, or the load log whose phases `/health` shows."""
        self.status, self.load_log = status or self.status, load_log or self.load_log
        if (health := self._health) is not None:
            health.tell(
                State(
                    status=self.status,
                    load_log=self.load_log,
                    allowed_origins=self.allowed_origins,
                )
            )

    def serves(self) -> None:
        """Changes the status to ready, and gives the server's port to Serve's proxy.

        Another thread than the one of signals may call it, and it may be called again.
        """
        is_stand_in = self._health is not None and not self._has_own_port
        if is_stand_in:
            end = time.monotonic() + HAND_OVER_S
            while not self._answers(BEHIND) and time.monotonic() < end:
                time.sleep(HAND_OVER_POLL_S)
        self.is_serving = True
        if not self._is_stopping.is_set():
            self.tell("ready")
        if is_stand_in:
            self._close_health()

    def close(self) -> None:
        """Ends the process that answers `/ping`, and removes the proxy's files."""
        self._close_health()
        self.proxy.close()

    def _close_health(self) -> None:
        health, self._health = self._health, None
        if health is not None:
            health.close()

    def watch(self) -> None:
        """Keeps `status` up to date until a signal stops the server.

        Raises `ModelLoadFailed` if a replica has died and the model cannot be loaded again, and
        `EngineDead` if Ray itself has died, which Serve cannot repair.
        """
        while not self._is_stopping.wait(PING_INTERVAL_S):
            if (dead_process := ray_processes.lost()) is not None:
                raise EngineDead(f"The server ends: {dead_process} has died.")
            is_ready = self._is_ready()
            if self._is_stopping.is_set():
                break
            if is_ready != (self.status == "ready"):
                self.tell("ready" if is_ready else "loading")
                log.warning("%s/ping: the server is %s.", self.url, self.status)
            if not is_ready and self.load_log:
                cluster.require_no_failure(self.load_log)
        self.tell("draining")

    def _is_ready(self) -> bool:
        """Returns whether a replica with a living engine serves, however busy it is."""
        try:
            return self._ping() == 200
        except TimeoutError:
            # A load balancer replaces a busy worker if its `/ping` says that it is loading.
            return cluster.is_running()
        except (OSError, HTTPException):
            return False

    def _answers(self, address: str) -> bool:
        """Returns whether a request passes the proxy to a replica with a living engine."""
        try:
            return self._ping(address) == 200
        except (OSError, HTTPException):
            return False

    def _ping(self, address: str | None = None) -> int:
        """Returns the status of the answer to `/ping`."""
        connection = self._connect(address)
        try:
            connection.request("GET", "/ping")
            return connection.getresponse().status
        finally:
            connection.close()

    def _connect(self, address: str | None) -> HTTPConnection:
        scheme, _, own = self.url.partition("://")
        host, _, port = own.rpartition(":")
        host = address or host
        if scheme == "http":
            return HTTPConnection(host, int(port), timeout=PING_TIMEOUT_S)
        # The certificate names the public host, and this is our own server.
        context = ssl._create_unverified_context()
        return HTTPSConnection(host, int(port), timeout=PING_TIMEOUT_S, context=context)

    def _stop(self, number: int, _frame: Any) -> None:
        is_first = not self._is_stopping.is_set()
        self._is_stopping.set()
        self.tell("draining")
        if is_first and not self.is_deployed:
            raise SystemExit(0)  # ends the wait for the replicas
        if not is_first and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait for running requests


def _can_stand_in(http_options: dict[str, Any]) -> bool:
    """Returns whether a `HealthListener` can answer on the port of Serve's proxy until it
    serves."""
    is_tls = bool(http_options.get("ssl_certfile"))
    return sys.platform == "linux" and http_options["host"] == "0.0.0.0" and not is_tls


def run(checked: Checked, config: str | Path, endpoint: HttpEndpoint) -> int:
    """Serves `config` until SIGTERM or Ctrl-C, then finishes running requests. Returns exit code
    0."""
    settings = cluster.with_load_log(checked.settings)
    endpoint.allowed_origins = settings.api.allowed_origins
    endpoint.tell(load_log=settings.load_log)
    try:
        try:
            with ColdStart(settings, checked.plan).watch():
                handle = cluster.serve_http(
                    settings, config, endpoint.proxy, checked.plan, endpoint.serves
                )
            endpoint.is_deployed = True
        except SystemExit:
            if endpoint.is_serving:
                _drain(cluster.handle(), settings.runpod.drain_s, endpoint.http_options["port"])
            raise
        endpoint.serves()
        log.info("Serving HTTP on %s; try: %s", endpoint.url, example(endpoint.url, settings))
        endpoint.watch()
        _drain(handle, settings.runpod.drain_s, endpoint.http_options["port"])
    except ServeError:
        endpoint.tell("failed")
        raise
    finally:
        ray_node.stop()
        endpoint.close()
    return 0


def example(url: str, settings: Settings) -> str:
    """Returns a command for a shell on this machine that asks the server at `url`."""
    insecure = "-k " if url.startswith("https:") else ""  # the certificate names the public host
    key = "-H 'Authorization: Bearer KEY' " if settings.api.needs_key else ""
    body = json.dumps({"prompt": "What is the capital of France?"})
    return f"curl {insecure}{key}{url}/prompt -d '{body}'"


def _drain(handle: Any, limit_s: float, port: int) -> None:
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
