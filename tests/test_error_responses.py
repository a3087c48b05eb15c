"""Errors that are answered before, beside and in the HTTP ingress have the same headers and body.

Each case is one place that answers an HTTP request with an error by itself.
"""

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import httpx
import pytest
from starlette.types import ASGIApp, Scope

from serve_app.api import early_answer, guard
from serve_app.api.early_answer import EarlyAnswer
from serve_app.api.guard import Guard
from serve_app.api.ingress import create_app
from serve_app.api.request_id import ids_before_serve
from serve_app.config.api_settings import ApiSettings
from serve_app.error_body import error_body
from serve_app.node import cors, haproxy_errors
from serve_app.node.haproxy_errors import MAX_URL_CHARS
from serve_app.node.health_server import HealthServer
from serve_app.protocol.cors import EXPOSED
from tests.fakes import MAX_TAKEN, FakeEngine, server
from tests.node.test_haproxy_program import QuietServer, Replica, haproxy

ORIGIN = "https://chat.example"
PATHS = ["/v1/chat/completions", "/v1/messages"]
GIVEN = {"origin": ORIGIN, "x-request-id": "mine", "content-length": "2"}


class Answer(NamedTuple):
    """The answer to a POST of a page of `ORIGIN` with the id "mine"."""

    status: int
    headers: dict[str, str]
    body: Any


def ask(app: ASGIApp, path: str, body: bytes | None = b"{}", **changed: str) -> Answer:
    """Returns the answer of `app`. A `body` of None never arrives."""
    sent: list[Any] = []

    async def receive() -> Any:
        if body is None:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    given = {name.replace("_", "-"): value for name, value in (GIVEN | changed).items()}
    headers = [(name.encode(), value.encode()) for name, value in given.items()]
    scope: Scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
    scope.update(query_string=b"", root_path="", http_version="1.1")

    async def call() -> None:
        await app(scope, receive, send)

    asyncio.run(call())
    content = b"".join(message.get("body", b"") for message in sent[1:])
    raw = [(name.decode().lower(), value.decode()) for name, value in sent[0]["headers"]]
    assert len(raw) == len(dict(raw)), "a header is there twice"
    return Answer(sent[0]["status"], dict(raw), json.loads(content))


class Server:
    """A server for pages of `ORIGIN`."""

    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.server = server(self.engine, api={"cors_origins": ORIGIN})
        early_answer.serves(self.server)

    @property
    def outside(self) -> ASGIApp:
        """The app behind the middlewares of a replica, in their order in front of Serve."""
        return Guard(EarlyAnswer(self.inside), ids_before_serve)

    @property
    def proxied(self) -> ASGIApp:
        """The app behind the guard of Serve's own proxy, a process without the setting."""
        return Guard(self.inside, ids_before_serve)

    @property
    def inside(self) -> ASGIApp:
        """The app alone. Serve sends the client's own id back."""
        app = create_app(lambda: self.server, [ORIGIN])
        return lambda scope, receive, send: app(scope, receive, _as_serve(send))


def _as_serve(send: Any) -> Any:
    async def with_id(message: Any) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], (b"x-request-id", b"mine")]
        await send(message)

    return with_id


class Ports(NamedTuple):
    """Ports of servers that answer without a replica, or whose replica ends the connection."""

    health: int
    unloaded: int
    dying: int


class Dying(Replica):
    def do_POST(self) -> None:
        self.close_connection = True


@pytest.fixture(scope="module")
def ports() -> Iterator[Ports]:
    with ExitStack() as stack:
        replica = stack.enter_context(QuietServer(("127.0.0.1", 0), Dying))
        thread = threading.Thread(target=replica.serve_forever, args=(0.02,))
        thread.start()
        stack.callback(thread.join)
        stack.callback(replica.shutdown)
        options = [f"--cors-origin={ORIGIN}", "--cors-origin=https://other.example"]
        yield Ports(
            stack.enter_context(health_server()),
            stack.enter_context(haproxy(options=options)).port,
            stack.enter_context(haproxy(replica.server_port, options=options)).port,
        )


@contextmanager
def health_server() -> Iterator[int]:
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    loop, ended = asyncio.new_event_loop(), asyncio.Event()
    one = HealthServer([listening], lambda: {"status": "loading"}, lambda: [ORIGIN])
    thread = threading.Thread(target=loop.run_until_complete, args=(one.serve(ended.wait()),))
    thread.start()
    yield port
    loop.call_soon_threadsafe(ended.set)
    thread.join()
    loop.close()


def over(port: int, path: str, query: str = "") -> Answer:
    """Returns the answer of the server on `port`."""
    url = f"http://127.0.0.1:{port}{path}{query}"
    response = httpx.post(url, content=b"{}", headers=GIVEN)
    return Answer(response.status_code, dict(response.headers), response.json())


def half(port: int, path: str) -> Answer:
    """Returns the answer to a request whose body does not end."""
    lines = [f"{name}: {value}" for name, value in GIVEN.items()]
    head = "\r\n".join([f"POST {path} HTTP/1.1", "host: a", *lines, "", "{"])
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(head.encode())
        received = b"".join(iter(lambda: connection.recv(4096), b"")).decode()
    first, _, rest = received.partition("\r\n")
    head, _, body = rest.partition("\r\n\r\n")
    headers = dict(line.split(": ", 1) for line in head.split("\r\n"))
    return Answer(int(first.split()[1]), headers, json.loads(body))


def full(one: Server) -> ASGIApp:
    one.engine.num_taken = MAX_TAKEN
    return one.outside


def drained(one: Server) -> ASGIApp:
    one.server.drain()
    return one.outside


def dead(one: Server) -> ASGIApp:
    one.engine.is_alive = False
    return one.outside


def without_key(one: Server) -> ASGIApp:
    one.server.keys.are_needed = True
    return one.outside


CASES: dict[str, tuple[int, str | None, Callable[[str, Server, Ports], Answer]]] = {
    "guard: the body is late": (
        408,
        "request_timeout",
        lambda path, one, _: ask(one.outside, path, None),
    ),
    "guard inside Serve: the body is late": (
        408,
        "request_timeout",
        lambda path, one, _: ask(one.inside, path, None),
    ),
    "guard: the id is invalid": (
        400,
        None,
        lambda path, one, _: ask(one.outside, path, x_request_id="\0"),
    ),
    "guard in Serve's proxy: the body is late": (
        408,
        "request_timeout",
        lambda path, one, _: ask(one.proxied, path, None),
    ),
    "guard in Serve's proxy: the id is invalid": (
        400,
        None,
        lambda path, one, _: ask(one.proxied, path, x_request_id="\0"),
    ),
    "early answer: the queue is full": (
        429,
        "queue_full",
        lambda path, one, _: ask(full(one), path),
    ),
    "early answer: draining": (503, "draining", lambda path, one, _: ask(drained(one), path)),
    "early answer: dead": (503, "engine_dead", lambda path, one, _: ask(dead(one), path)),
    "early answer: no key": (
        401,
        "invalid_api_key",
        lambda path, one, _: ask(without_key(one), path),
    ),
    "ingress: no JSON": (400, None, lambda path, one, _: ask(one.inside, path, b"{")),
    "ingress: no such route": (
        404,
        "not_found",
        lambda path, one, _: ask(one.inside, f"{path}/nothing"),
    ),
    "health server: loading": (503, "loading", lambda path, _, ports: over(ports.health, path)),
    "HAProxy: loading": (503, "loading", lambda path, _, ports: over(ports.unloaded, path)),
    "HAProxy: the replica dies": (
        503,
        "engine_dead",
        lambda path, _, ports: over(ports.dying, path),
    ),
    "HAProxy: the URL is too long": (
        414,
        None,
        lambda path, _, ports: over(ports.dying, path, f"?{'a' * MAX_URL_CHARS}"),
    ),
    "HAProxy: the body is late": (
        408,
        "request_timeout",
        lambda path, _, ports: half(ports.dying, path),
    ),
}
"""The status, the error's code, and the request that gets the error, by the place that answers."""


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", CASES)
def test_every_error_can_be_read(
    case: str, path: str, ports: Ports, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page of an allowed origin reads it; it has JSON in the shape of the path's API, one id of
    ours, and the client's id."""
    status, code, send = CASES[case]
    if status == 408:
        monkeypatch.setattr(guard, "BODY_S", 0.05)
    answer = send(path, Server(), ports)
    headers, error = answer.headers, answer.body["error"]
    assert (answer.status, error["code"]) == (status, code)
    assert headers["access-control-allow-origin"] == ORIGIN
    assert set(EXPOSED) <= set(headers["access-control-expose-headers"].split(", "))
    assert headers["vary"] == "Origin"
    assert headers["content-type"] == "application/json"
    assert headers["x-mixtral-request-id"] == error["request_id"]
    assert headers["x-request-id"] == ("mine" if "invalid" not in case else error["request_id"])
    if path == "/v1/messages":
        assert (answer.body["type"], answer.body["request_id"]) == ("error", error["request_id"])
        assert headers["request-id"] == error["request_id"]
    else:
        assert answer.body.keys() == {"error"}
        assert "request-id" not in headers


@pytest.mark.parametrize("place", Ports._fields)
def test_permission_is_given_without_a_replica(place: str, ports: Ports) -> None:
    """A browser asks before it sends JSON; only pages of the setting's origins get permission."""
    url = f"http://127.0.0.1:{getattr(ports, place)}/v1/messages"
    asked = {
        "origin": ORIGIN,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    response = httpx.options(url, headers=asked)
    assert response.status_code in (200, 204)
    assert response.headers["access-control-allow-origin"] == ORIGIN
    assert response.headers["access-control-allow-methods"] == "GET, POST"
    assert "authorization" in response.headers["access-control-allow-headers"]
    assert "x-mixtral-request-id" in response.headers
    refused = httpx.options(url, headers=asked | {"origin": "https://evil.example"})
    assert refused.status_code >= 400
    assert "access-control-allow-origin" not in refused.headers


def test_allowed_origins() -> None:
    """`*` allows every page; without the setting no page of another origin is allowed."""
    found = [
        ApiSettings(cors_origins=each).allowed_origins
        for each in (f"{ORIGIN}, *", ORIGIN, ",", None)
    ]
    assert found == [["*"], [ORIGIN], [], []]
    assert cors.headers(["*"], {"origin": ORIGIN})["Access-Control-Allow-Origin"] == "*"
    assert cors.headers([], {"origin": ORIGIN}) == {}


def test_haproxy_and_the_guard_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A late body has one sentence and one form, wherever it is noticed."""
    monkeypatch.setattr(guard, "BODY_S", 0.05)
    body = ask(Server().outside, "/prompt", None).body
    request_id = body["error"]["request_id"]
    assert body == error_body(haproxy_errors.TOO_SLOW, request_id)
