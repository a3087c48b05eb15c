"""HealthListener: answers `/ping` in a child process while Ray starts and the model loads."""

import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from serve_app.machine.ports import listen, listen_before
from serve_app.node.health_server import State


class HealthListener:
    """Answers from its construction until `close`, or until this process ends.

    Earlier connections wait until the child process (`health_server.py`) runs.
    """

    def __init__(self, sockets: Sequence[socket.socket]) -> None:
        """Starts the process and passes it `sockets`, which already listen."""
        numbers = [listener.fileno() for listener in sockets]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "serve_app.node.health_server", *map(str, numbers)],
            stdin=subprocess.PIPE,
            bufsize=0,
            pass_fds=numbers,
            cwd=Path(__file__).parents[2],
            # A session of its own, so that a signal to this process's group does not end it.
            start_new_session=True,
        )
        for listener in sockets:
            listener.close()

    @classmethod
    def on_port(cls, port: int) -> "HealthListener":
        """Listens on PORT_HEALTH, on every interface. Raises `ConfigError` if it is in use."""
        return cls([listen("PORT_HEALTH", port)])

    @classmethod
    def before(cls, port: int) -> "HealthListener":
        """Answers on `port` until a server that listens there on every interface takes over.

        The server may start at any time; it gets the connections after `close`.
        """
        return cls(listen_before(port))

    def tell(self, state: State) -> None:
        """Changes the answers. A signal handler may call it, because it is a single unbuffered
        write."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # the process has ended, or is being ended
            self._process.stdin.write(json.dumps(state).encode() + b"\n")

    def close(self) -> None:
        """Ends the process, after it has stopped listening and given its last answers."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
