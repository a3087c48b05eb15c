"""HttpEndpoint: the server's port and status, and the signals that stop it."""

import logging
import signal
import ssl
import sys
import threading
import time
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any

from serve_app.errors import EngineDead
from serve_app.machine.ports import free_port, require_free
from serve_app.node import deployment, ray_processes
from serve_app.node.haproxy import Proxy
from serve_app.node.health_listener import HealthListener
from serve_app.node.health_server import State

log = logging.getLogger(__name__)

PING_INTERVAL_S = 1.0
"""Seconds between two requests for `/ping`, once the deployment serves."""
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
                deployment.require_no_failure(self.load_log)
        self.tell("draining")

    def _is_ready(self) -> bool:
        """Returns whether a replica with a living engine serves, however busy it is."""
        try:
            return self._ping() == 200
        except TimeoutError:
            # A load balancer replaces a busy worker if its `/ping` says that it is loading.
            return deployment.is_running()
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
