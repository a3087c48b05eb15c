"""Requests of strangers are limited: the time of a body, and headers for Serve."""

import asyncio
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from serve_app.api import guard
from serve_app.api.guard import Guard
from tests import virtual_time
from tests.api.conftest import Endpoint

HALF = (
    b"POST %s HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    b'Content-Length: 1000000\r\n\r\n{"prompt": "'
)
"""The head of a request, and the beginning of its body."""


@contextmanager
def connection(endpoint: Endpoint) -> Iterator[socket.socket]:
    host, _, port = endpoint.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), 10) as opened:
        yield opened


def read(opened: socket.socket) -> tuple[bytes, Any]:
    """Returns the answer's head and body, once the server has closed the connection."""
    answer = b"".join(iter(lambda: opened.recv(4096), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"\r\nconnection: close" in head
    return head, json.loads(body)


def test_a_body_has_a_deadline(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a body is a 408, whose connection is closed; the next request is answered."""
    monkeypatch.setattr(guard, "BODY_S", 0.1)
    with connection(endpoint) as opened:
        opened.sendall(HALF % b"/v1/completions")
        head, body = read(opened)
    assert head.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
    assert (body["error"]["code"], body["error"]["retry"]) == ("request_timeout", True)
    assert len(body["error"]["request_id"]) == 32


def test_a_refusal_has_the_shape_of_the_api(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guard refuses a request of the Messages API in Anthropic's shape."""
    monkeypatch.setattr(guard, "BODY_S", 0.1)
    with connection(endpoint) as opened:
        opened.sendall(HALF % b"/v1/messages")
        head, body = read(opened)
    assert (body["type"], body["request_id"]) == ("error", body["error"]["request_id"])
    assert f"\r\nrequest-id: {body['request_id']}" in head.decode()


def test_large_bodies_are_let_in_at_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two bodies of 1 MB wait together for all but the beginning of each; small ones never wait."""
    waits: list[float] = []
    now = 1000.0

    async def sleep(seconds: float) -> None:
        nonlocal now
        waits.append(seconds)
        now += seconds

    fake = SimpleNamespace(sleep=sleep, timeout=asyncio.timeout)
    monkeypatch.setattr(guard, "asyncio", fake)
    monkeypatch.setattr(guard, "time", SimpleNamespace(monotonic=lambda: now))
    part = b"a" * 100_000

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["more_body"]:
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})

    def body(num_parts: int) -> Receive:
        ends = iter([True] * (num_parts - 1) + [False])

        async def receive() -> Message:
            return {"type": "http.request", "body": part, "more_body": next(ends)}

        return receive

    async def ask(*nums_parts: int) -> None:
        headers = [(b"transfer-encoding", b"chunked")]
        await asyncio.gather(*(sent(app, headers, body(number)) for number in nums_parts))

    asyncio.run(ask(1, 1, 1))
    assert waits == []
    asyncio.run(ask(10, 10))
    assert sum(waits) == pytest.approx(2 * 900_000 / guard.LARGE_BYTES_PER_S)


@pytest.mark.parametrize(("rate", "status"), [(1_000_000, 408), (1, 200)])
def test_a_body_has_a_least_rate(monkeypatch: pytest.MonkeyPatch, rate: int, status: int) -> None:
    """A body that comes byte by byte is cut; bytes at the least rate prolong its time."""
    monkeypatch.setattr(guard, "MIN_BODY_BYTES_PER_S", rate)
    clock = SimpleNamespace(monotonic=lambda: asyncio.get_running_loop().time())
    monkeypatch.setattr(guard, "time", clock)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for _ in range(40):
            if (await receive())["type"] == "http.disconnect":
                break
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def byte() -> Message:
        await asyncio.sleep(1)
        return {"type": "http.request", "body": b"a", "more_body": True}

    headers = [(b"transfer-encoding", b"chunked")]
    assert virtual_time.run(sent(app, headers, byte))[0]["status"] == status


def test_an_answer_may_take_longer() -> None:
    """The deadline is the body's alone."""

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive())["body"] == b"all"
        with pytest.raises(TimeoutError):  # a server that waits for the end of the connection
            await asyncio.wait_for(receive(), 2 * guard.BODY_S)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    headers = [(b"content-length", b"3")]
    assert virtual_time.run(sent(slow, headers, once(b"all")))[0]["status"] == 200


@pytest.mark.parametrize("path", ["/ping", "/health", "/metrics", "/v1/models", "/nothing"])
def test_only_routes_with_a_body_read_it(endpoint: Endpoint, path: str) -> None:
    """A half-sent request for any other route is answered at once, and its connection closed."""
    with connection(endpoint) as opened:
        opened.sendall(HALF % path.encode())
        status, _ = read(opened)
    assert status.startswith(b"HTTP/1.1 40")


def test_a_body_that_is_refused_is_not_read_on(endpoint: Endpoint) -> None:
    """A body of 10 GB is a 413 after its headers, and then the connection is gone."""
    with connection(endpoint) as opened:
        opened.sendall((HALF % b"/prompt").replace(b"1000000", b"10000000000"))
        status, _ = read(opened)
        assert status.startswith(b"HTTP/1.1 413")
        with pytest.raises(ConnectionError):
            opened.sendall(b"a" * 100_000_000)


def once(body: bytes) -> Receive:
    """Returns an ASGI `receive` with the whole body; later calls wait."""
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if not left:
            await asyncio.Event().wait()
        return left.pop()

    return receive


async def sent(
    app: Any, headers: list[tuple[bytes, bytes]], receive: Receive | None = None
) -> list[Message]:
    """Returns what the guard sends in front of `app`."""
    messages: list[Message] = []

    async def send(message: Message) -> None:
        messages.append(message)

    scope = {"type": "http", "path": "/", "headers": headers}
    await Guard(app)(scope, receive or once(b""), send)
    return messages


@pytest.mark.parametrize("value", [b"\xff", b"a" * 129, b"", b"a\x00b", b"\xc3\xa9"])
def test_an_id_that_is_no_id_is_a_400(value: bytes) -> None:
    """It is neither logged nor sent back; nothing else sees the request."""
    messages = asyncio.run(sent(None, [(b"x-request-id", value)]))
    assert messages[0]["status"] == 400
    assert json.loads(messages[1]["body"])["error"]["message"].startswith("x-request-id must")


def test_headers_for_serve_are_removed() -> None:
    """A client switches nothing of Serve's; its own headers pass, and the time is noted."""
    seen: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)

    kept = [(b"authorization", b"Bearer \xff"), (b"x-request-id", b"mine")]
    for_serve = [
        (b"x-request-disconnect-disabled", b"?1"),
        (b"x-request-timeout-seconds", b"0"),
        (b"x-session-id", b"\xff"),
        (b"x_session_id", b"\xff"),
        (b"serve_multiplexed_model_id", b"\xff"),
        (b"serve-multiplexed-model-id", b"a"),
        (b"\xff", b"a"),
    ]
    asyncio.run(sent(app, [*for_serve, *kept]))
    (scope,) = seen
    assert scope["headers"] == kept
    assert scope[guard.ARRIVED] > 0


def test_the_headers_are_those_that_serve_reads() -> None:
    """The names are Serve's own, with `-` for `_`."""
    from ray.serve._private import constants

    names = (
        constants.SERVE_HTTP_REQUEST_TIMEOUT_S_HEADER,
        constants.SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER,
        constants.SERVE_SESSION_ID,
        constants.SERVE_MULTIPLEXED_MODEL_ID,
    )
    assert {name.replace("_", "-").encode() for name in names} == guard.REMOVED
    assert constants.SERVE_HTTP_REQUEST_ID_HEADER.encode() == guard.CLIENT_ID
