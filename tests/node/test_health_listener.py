"""The listener on PORT_HEALTH over real sockets: its answers, and requests that it survives."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.config.settings import ConfigError
from serve_app.node import health_server
from serve_app.node.health_listener import HealthListener
from serve_app.node.health_server import HealthServer
from tests.worker.conftest import until


@pytest.fixture
def told() -> dict[str, Any]:
    """The state with which the listener answers; a test may change it."""
    return {"status": "loading", "load": [{"phase": "read", "seconds": 1.5}]}


@dataclass
class Listener:
    port: int


@pytest.fixture
def listener(told: dict[str, Any]) -> Iterator[Listener]:
    """The server of the health process, in a thread of the test."""
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    loop, ended = asyncio.new_event_loop(), asyncio.Event()
    serving = HealthServer([listening], lambda: told, list).serve(ended.wait())
    thread = threading.Thread(target=loop.run_until_complete, args=(serving,))
    thread.start()
    yield Listener(port)
    loop.call_soon_threadsafe(ended.set)
    thread.join()
    loop.close()


def get(listener: Listener, path: str) -> httpx.Response:
    return httpx.get(f"http://127.0.0.1:{listener.port}{path}")


def said(listener: Listener, sent: bytes) -> bytes:
    """Returns the whole response to `sent`, until the listener closes the connection."""
    with socket.create_connection(("127.0.0.1", listener.port), timeout=30) as connection:
        answer = b""
        # It may hang up on a client that is still talking.
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            connection.sendall(sent)
            while got := connection.recv(65536):
                answer += got
    return answer


@pytest.mark.parametrize(
    ("status", "code"), [("loading", 204), ("ready", 200), ("draining", 503), ("failed", 503)]
)
def test_ping_is_what_the_load_balancer_reads(
    listener: Listener, told: dict[str, Any], status: str, code: int
) -> None:
    """204 while it loads, 200 when it is ready, and 503 in any other state."""
    told["status"] = status
    assert get(listener, "/ping").status_code == code
    health = get(listener, "/health?verbose=1")
    assert health.status_code == (200 if status == "ready" else 503)
    assert health.json() == told


def test_other_requests_are_refused(listener: Listener) -> None:
    """A wrong path, a wrong method and bytes that are not HTTP each get their own status."""
    early = httpx.post(f"http://127.0.0.1:{listener.port}/v1/completions", content=b"{}")
    assert (early.status_code, early.headers["retry-after"]) == (503, "5")
    error = early.json()["error"]
    assert error["code"] == "loading"
    ids = [early.headers[name] for name in ("x-mixtral-request-id", "x-request-id")]
    assert ids == [error["request_id"]] * 2
    assert "request-id" not in early.headers
    messages = httpx.post(f"http://127.0.0.1:{listener.port}/v1/messages", content=b"{}")
    assert messages.headers["request-id"] == messages.json()["request_id"]
    assert httpx.post(f"http://127.0.0.1:{listener.port}/ping").status_code == 405
    assert said(listener, b"\x16\x03\x01 hello\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    assert said(listener, b"HEAD /health HTTP/1.0\r\n\r\n").endswith(b"\r\n\r\n")


def test_it_survives_its_clients(
    listener: Listener, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Endless headers, half requests, resets and silence close only the connection concerned."""
    monkeypatch.setattr(health_server, "REQUEST_S", 0.5)
    with contextlib.ExitStack() as held:
        for sent in (b"", b"GET /ping HTTP/1.1\r\n", b"\0" * 100):
            slow = held.enter_context(socket.create_connection(("127.0.0.1", listener.port)))
            slow.sendall(sent)
            assert get(listener, "/ping").status_code == 204
        assert said(listener, b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 100_000) == b""
        assert slow.recv(1) == b"", "it waits for a silent client for ever"
    assert get(listener, "/ping").status_code == 204
    assert not caplog.records


def test_a_taken_port_is_one_sentence(listener: Listener) -> None:
    """The sentence names the variable and the port."""
    with pytest.raises(ConfigError, match=f"^PORT_HEALTH: port {listener.port} of "):
        HealthListener.on_port(listener.port)


def test_it_stands_before_a_server_on_the_same_port(tmp_path: Path) -> None:
    """Its answers show the state that it was sent; after `close` the server gets the port."""
    with socket.create_server(("0.0.0.0", 0), reuse_port=True) as server:
        port = server.getsockname()[1]
        listener = HealthListener.before(port)
        (log := tmp_path / "load.jsonl").write_text(
            '{"phase": "ray", "state": "done", "seconds": 2.5}\n'
        )
        assert get(Listener(port), "/ping").status_code == 204
        listener.tell({"status": "ready", "load_log": str(log), "allowed_origins": []})
        until(lambda: get(Listener(port), "/ping").status_code == 200)
        health = get(Listener(port), "/health").json()
        assert health == {"status": "ready", "load": [{"phase": "ray", "seconds": 2.5}]}
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
        listener.close()
        server.setblocking(True)
        with socket.create_connection(("127.0.0.1", port)), server.accept()[0]:
            pass


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
def test_a_refusal_has_the_shape_of_the_api(listener: Listener, path: str) -> None:
    """While the model loads, the Messages API gets Anthropic's errors, other routes OpenAI's."""
    response = httpx.post(f"http://127.0.0.1:{listener.port}{path}", json={})
    body = response.json()
    assert (response.status_code, body["error"]["type"]) == (503, "overloaded_error")
    assert ("type" in body) == (path == "/v1/messages")
