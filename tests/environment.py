"""The environment of a process that must see nothing of this one's."""

import os
import sys
from pathlib import Path

from serve_app.machine.ports import free_port
from serve_app.node import haproxy_program
from serve_app.node.haproxy_program import BINARY_PATH

KEPT = ("PATH", "COVERAGE_PROCESS_CONFIG")
"""Variables that it inherits: where programs are, and by which coverage counts its lines too."""


def bare(home: Path) -> dict[str, str]:
    """Returns the variables in `KEPT`, and `home` as its home folder."""
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    return {**kept, "HOME": str(home)}


def haproxy_of_its_own(folder: Path) -> dict[str, str]:
    """Variables for Serve's HAProxy mode, with files and ports beside whatever else runs here.

    The path of `folder` has to be short, because a socket's has at most 97 characters.
    """
    program = folder / "mixtral-haproxy"  # the image has it installed
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -I {haproxy_program.__file__} "$@"\n')
    program.chmod(0o700)
    direct = free_port()
    return {
        BINARY_PATH: str(program),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(direct),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(direct + 20),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/metrics.sock",
    }
