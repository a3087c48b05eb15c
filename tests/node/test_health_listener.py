"""The listener on PORT_HEALTH over real sockets: its answers, and requests that it survives."""

import contextlib
import json
import socket
from typing import Any

import httpx
import pytest

from serve_app.config.settings import ConfigError
from serve_app.node import health_listener
from serve_app.node.health_listener import HealthListener


@pytest.fixture
def told() -> dict[str, Any]:
    """The state that the listener answers with; a test may change it."""
    return {"status": "loading", "load": [{"phase": "read", "seconds": 1.5}]}


@pytest.fixture
def listener(told: dict[str, Any]) -> HealthListener:
    return HealthListener(0, lambda: told)


def get(listener: HealthListener, path: str) -> httpx.Response:
    return httpx.get(f"http://127.0.0.1:{listener.port}{path}")


def said(listener: HealthListener, sent: bytes) -> bytes:
    """The whole response to `sent`, until the listener closes the connection."""
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
    listener: HealthListener, told: dict[str, Any], status: str, code: int
) -> None:
    """204 while it loads, 200 when it is ready, and 503 in any other state."""
    told["status"] = status
    assert get(listener, "/ping").status_code == code
    health = get(listener, "/health?verbose=1")
    assert health.status_code == (200 if status == "ready" else 503)
    assert health.json() == told


def test_other_requests_are_refused(listener: HealthListener) -> None:
    """A wrong path, a wrong method and bytes that are not HTTP each get their own status."""
    assert get(listener, "/v1/models").status_code == 404
    assert httpx.post(f"http://127.0.0.1:{listener.port}/ping").status_code == 405
    assert said(listener, b"\x16\x03\x01 hello\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    assert said(listener, b"HEAD /health HTTP/1.0\r\n\r\n").endswith(b"\r\n\r\n")


def test_it_survives_its_clients(
    listener: HealthListener, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Endless heads, half requests, resets and silence close their own connection only."""
    monkeypatch.setattr(health_listener, "REQUEST_S", 0.5)
    with contextlib.ExitStack() as held:
        for sent in (b"", b"GET /ping HTTP/1.1\r\n", b"\0" * 100):
            slow = held.enter_context(socket.create_connection(("127.0.0.1", listener.port)))
            slow.sendall(sent)
            assert get(listener, "/ping").status_code == 204
        assert said(listener, b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 100_000) == b""
        assert slow.recv(1) == b"", "it waits for a silent client for ever"
    assert get(listener, "/ping").status_code == 204
    assert not caplog.records


def test_a_taken_port_is_one_sentence(listener: HealthListener) -> None:
    """The sentence names the variable and the port."""
    with pytest.raises(ConfigError, match=f"^PORT_HEALTH: port {listener.port} of "):
        HealthListener(listener.port, dict)
    assert json.loads(get(listener, "/health").content)["status"] == "loading"
