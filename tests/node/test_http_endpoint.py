"""The state of the HTTP endpoint, with a test's own server instead of Serve's proxy."""

import signal
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from serve_app.config.settings import ConfigError
from serve_app.errors import ModelLoadFailed
from serve_app.node import deployment, http_endpoint
from serve_app.node.http_endpoint import HttpEndpoint
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
def endpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: Server
) -> Iterator[HttpEndpoint]:
    monkeypatch.setattr(http_endpoint, "PING_INTERVAL_S", 0.02)
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    endpoint = HttpEndpoint({"host": "0.0.0.0", "port": 0})
    endpoint.http_options["port"] = server.port
    endpoint.is_deployed = True
    endpoint.load_log = str(tmp_path / "load.jsonl")
    yield endpoint
    endpoint.close()
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_ready_is_what_answers(endpoint: HttpEndpoint, server: Server) -> None:
    """The status is "loading" until the server answers, then "ready"; "draining" after a signal."""
    watching = threading.Thread(target=endpoint.watch)
    watching.start()
    until(lambda: endpoint.status == "ready")
    server.status = 503
    until(lambda: endpoint.status == "loading")
    server.status = 200
    until(lambda: endpoint.status == "ready")
    signal.raise_signal(signal.SIGTERM)
    watching.join(30)
    assert endpoint.status == "draining"


def test_a_busy_server_is_ready(
    endpoint: HttpEndpoint, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While `/ping` waits behind other requests, Serve's own health checks say what is true."""
    monkeypatch.setattr(http_endpoint, "PING_TIMEOUT_S", 0.02)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        endpoint.http_options["port"] = silent.getsockname()[1]
        for known in (True, False):
            monkeypatch.setattr(deployment, "is_running", lambda known=known: known)
            assert endpoint._is_ready() is known
    assert not endpoint._is_ready()  # nothing listens any more


def test_a_load_that_failed_again_is_the_end(
    endpoint: HttpEndpoint, server: Server, tmp_path: Path
) -> None:
    """The error that the new replica wrote into the load log is raised."""
    server.status = 503
    (tmp_path / "load.jsonl").write_text(
        '{"phase": "read", "state": "failed", "error": "File cut off.", "retry": false}\n'
    )
    with pytest.raises(ModelLoadFailed, match=r"File cut off\."):
        endpoint.watch()


def test_a_stop_before_anything_serves_is_the_end(endpoint: HttpEndpoint) -> None:
    """Exit code 0, at once: no request runs."""
    endpoint.is_deployed = False
    with pytest.raises(SystemExit) as ended:
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 0


@pytest.mark.parametrize("name", ["port", "port_health"])
def test_a_port_that_is_taken_is_named(server: Server, name: str) -> None:
    """The error comes before anything loads, and names the variable to change."""
    with socket.create_server(("0.0.0.0", 0)) as taken:
        ports = {"port": 0, "port_health": None, name: taken.getsockname()[1]}
        with pytest.raises(
            ConfigError, match=rf"^{name.upper()}: port \d+ of 0\.0\.0\.0 is in use"
        ):
            HttpEndpoint({"host": "0.0.0.0", "port": ports["port"]}, ports["port_health"])


def test_a_second_ctrl_c_does_not_wait(endpoint: HttpEndpoint) -> None:
    """The first one lets running requests finish, the second one ends the server."""
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
