"""Serve's HAProxy mode on one machine: HAProxy sends requests straight to the replica.

Ray Serve reads the mode and its ports from the environment when a process imports `ray.serve`, so
`Proxy.prepare` must be called before Ray starts. `Proxy.options` must be called before Serve
starts: it writes the program that Serve starts in place of HAProxy (see `haproxy_program.py`).

On one machine, the replica and Serve's fallback proxy (for times without a replica) listen on free
ports of the loopback interface, so that several servers can run side by side.
"""

import logging
import os
import shlex
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import serve_app
from serve_app.config.api_settings import ApiSettings
from serve_app.machine import own_folder
from serve_app.machine.ports import free_port
from serve_app.node import haproxy_program

GUARD = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
MODE = "RAY_SERVE_ENABLE_HA_PROXY"
MAX_PORT = 65_535
NUM_REPLICA_PORTS = 100
"""Number of ports for replicas. If a port is in use, Serve tries the next one."""


class Proxy:
    """The proxy of a server with these `http_options`: HAProxy or Serve's own."""

    def __init__(self, http_options: dict[str, Any]) -> None:
        self._http_options = http_options

    @cached_property
    def obstacle(self) -> str | None:
        """The reason why Serve's own proxy is used; None if HAProxy is used."""
        if self._http_options.get("ssl_certfile"):
            return "Serve does not pass `http_options.ssl_certfile` to HAProxy"
        if sys.platform != "linux":
            return "`ray[serve]` contains HAProxy only on Linux"
        if (mode := os.environ.setdefault(MODE, "1")) != "1":
            return f"{MODE} is {mode!r} in the environment"
        try:
            haproxy_program.binary()
        except OSError as error:
            return f"HAProxy cannot be started: {error}"
        return None

    @cached_property
    def _folder(self) -> Path:
        """The folder of HAProxy's files, for this user alone."""
        # The path of a socket has at most 97 characters, and Serve appends the node's id, of 56.
        return own_folder.create("mixtral-")

    @property
    def _program(self) -> Path:
        return self._folder / "haproxy"

    def prepare(self) -> None:
        """Sets the environment of Ray's processes, which start later."""
        os.environ[GUARD] = "serve_app.api.guard:middlewares"
        if self.obstacle is not None:
            os.environ[MODE] = "0"
            return
        folder = self._folder
        replicas = min(free_port(), MAX_PORT - NUM_REPLICA_PORTS)
        variables = {
            haproxy_program.BINARY_PATH: str(self._program),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
            "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
            # Serve's own figures would cost a message for each request; `/metrics` has ours.
            "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(replicas),
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(replicas + NUM_REPLICA_PORTS),
            "RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH": f"{__name__}:expect_one_machine",
            # A draining period is only useful with HAProxy on other nodes.
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
            # Serve starts a dead HAProxy again after three failed checks, by default 30 s.
            "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
        }
        for name, value in variables.items():
            os.environ[name] = value

    def options(self, api: ApiSettings) -> dict[str, Any]:
        """`http_options` for Serve. Behind HAProxy, Serve itself listens on loopback."""
        if self.obstacle is not None:
            return self._http_options
        from ray._common.network_utils import get_localhost_ip

        self._write_program(api)
        return self._http_options | {"host": get_localhost_ip()}

    def close(self) -> None:
        """Removes HAProxy's files."""
        if "_folder" in self.__dict__:
            own_folder.remove(self.__dict__.pop("_folder"))

    def _write_program(self, api: ApiSettings) -> None:
        host, port = self._http_options["host"], self._http_options["port"]
        bind = f"[{host}]:{port} v4v6" if ":" in host else f"{host}:{port}"
        options = [f"--bind={bind}", f"--max-connections={api.max_connections}"]
        if api.max_connections_per_address is not None:
            options.append(f"--max-connections-per-address={api.max_connections_per_address}")
            options += [f"--trusted={network}" for network in api.trusted_networks]
        options += [f"--cors-origin={origin}" for origin in api.allowed_origins]
        root = str(Path(serve_app.__file__).parents[1])
        code = f"import sys; sys.path.append({root!r}); from {haproxy_program.__name__} import main"
        command = [sys.executable, "-I", "-c", f"{code}; main()", *options, "--"]
        self._program.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
        self._program.chmod(0o700)


def expect_one_machine() -> None:
    """Drops Serve's warning that HAProxy on other machines cannot reach a replica on loopback.

    Serve calls this function in its controller.
    """
    logging.getLogger("ray.serve").addFilter(
        lambda record: "from HAProxy on other nodes" not in record.getMessage()
    )
