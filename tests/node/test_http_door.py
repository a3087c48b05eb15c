"""The HTTP door's own idea of how far it is, beside a server that a test plays."""

import signal
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from serve_app.config.settings import ConfigError, EntrySettings
from serve_app.errors import ModelLoadFailed
from serve_app.node import http
from serve_app.node.http import Door
from tests.worker.conftest import until


class Server:
    """Answers `/ping` with `status`, on a port of its own."""

    def __init__(self) -> None:
        self.status = 200
        test = self

        class Ping(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(test.status)
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self.http = HTTPServer(("127.0.0.1", 0), Ping)
        self.port = self.http.server_port


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    with server.http:
        thread = threading.Thread(target=server.http.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.http.shutdown()
        thread.join()


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Door]:
    monkeypatch.setattr(http, "LOOK_S", 0.02)
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    door = Door(EntrySettings(port=0))
    door.is_serving = True
    door.load_log = str(tmp_path / "load.jsonl")
    yield door
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_ready_is_what_answers(door: Door, server: Server) -> None:
    """A deployment that stops answering is loading again, until it answers or is told to stop."""
    watching = threading.Thread(target=door.watch, args=(server.port,))
    watching.start()
    until(lambda: door.status == "ready")
    server.status = 503
    until(lambda: door.status == "loading")
    server.status = 200
    until(lambda: door.status == "ready")
    signal.raise_signal(signal.SIGTERM)
    watching.join(30)
    assert door.status == "draining"


def test_a_load_that_failed_again_is_the_end(door: Door, server: Server, tmp_path: Path) -> None:
    """What the new replica wrote down is the cause; without it the server waits for Serve."""
    server.status = 503
    (tmp_path / "load.jsonl").write_text(
        '{"phase": "read", "state": "failed", "error": "File cut off.", "retry": false}\n'
    )
    with pytest.raises(ModelLoadFailed, match=r"File cut off\."):
        door.watch(server.port)


def test_a_stop_before_anything_serves_is_the_end(door: Door) -> None:
    """Exit code 0, at once: nobody is being answered."""
    door.is_serving = False
    with pytest.raises(SystemExit) as ended:
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 0


@pytest.mark.parametrize("name", ["port", "port_health"])
def test_a_port_that_is_taken_is_named(server: Server, name: str) -> None:
    """Before anything is loaded, and by the variable that must change."""
    with socket.create_server(("0.0.0.0", 0)) as taken:
        ports = {"port": 0, name: taken.getsockname()[1]}
        with pytest.raises(ConfigError, match=f"{name.upper()}: nothing can listen"):
            Door(EntrySettings(**ports))
