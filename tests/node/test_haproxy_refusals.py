"""HAProxy itself refuses requests beyond the number of places that a replica has sent."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

import httpx
import pytest

from serve_app.api.routes import ROUTES
from serve_app.error_body import error_body
from serve_app.node import haproxy_errors
from serve_app.node.haproxy_refusals import PATHS
from serve_app.protocol.header_names import PLACES, REFUSED
from tests.node.test_haproxy_program import QuietServer, Server, haproxy
from tests.worker.conftest import until

NUM_PLACES = 3
PLACE_S = 10
MIN_S = 2
LIMITS = f"{NUM_PLACES},{PLACE_S * 1_000_000},600000000,{MIN_S}"
"""The replica's `PLACES`. After a refusal, HAProxy sends it no further request in this test."""


class Engine:
    """The behavior of the replica in one test, and the requests that it received."""

    def __init__(self) -> None:
        self.is_full = False
        self.released = threading.Event()
        self.num_waiting = 0
        self.headers: list[Any] = []

    def open_requests(self, threads: ThreadPoolExecutor, http: httpx.Client, number: int) -> None:
        """Starts requests that wait for `released`."""
        before = self.num_waiting
        self.opened: list[Future[httpx.Response]] = [
            threads.submit(http.post, "/prompt") for _ in range(number)
        ]
        until(lambda: self.num_waiting == before + number)


@contextmanager
def replica(engine: Engine) -> Iterator[int]:
    """Yields the port of a server in place of a replica."""

    class Replica(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer(200, {PLACES: LIMITS} if self.path == "/ping" else {})

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            engine.headers.append(self.headers)
            if engine.is_full:
                self.answer(429, {PLACES: LIMITS})
                return
            engine.num_waiting += 1
            engine.released.wait(30)
            self.answer(200, {})

        def answer(self, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {"content-length": "2", **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None: ...

    with QuietServer(("127.0.0.1", 0), Replica) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server.server_port
        finally:
            engine.released.set()
            server.shutdown()
            thread.join()


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def server(engine: Engine) -> Iterator[Server]:
    with replica(engine) as port, haproxy(port, options=["--cors-origin=*"]) as server:
        yield server


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    url = f"http://127.0.0.1:{server.port}"
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as threads:
        yield threads


@pytest.fixture
def full(engine: Engine, http: httpx.Client, threads: ThreadPoolExecutor) -> Iterator[None]:
    """All places are taken, and the replica has refused the request that asked."""
    http.get("/ping")
    engine.open_requests(threads, http, NUM_PLACES)
    engine.is_full = True
    asked = http.post("/prompt")
    assert (asked.status_code, asked.text) == (429, "{}")
    yield
    engine.released.set()


@pytest.mark.parametrize("path", PATHS)
def test_a_refusal_is_as_the_replicas(full: None, http: httpx.Client, path: str) -> None:
    """It has the JSON of our table, one id, the client's own id, and no header of ours inside."""
    response = http.post(path, headers={"x-request-id": "mine", "origin": "https://a.example"})
    body = response.json()
    assert response.status_code == 429
    assert body == error_body(haproxy_errors.FULL, body["error"]["request_id"], path)
    assert response.headers["x-mixtral-request-id"] == body["error"]["request_id"]
    assert response.headers["x-request-id"] == "mine"
    assert response.headers["access-control-allow-origin"] == "*"
    anthropics = body["error"]["request_id"] if path == "/v1/messages" else None
    assert response.headers.get("request-id") == anthropics
    unnamed = http.post(path)
    assert unnamed.headers["x-request-id"] == unnamed.headers["x-mixtral-request-id"]
    assert PLACES not in http.get("/ping").headers


def test_refused_requests_get_one_turn_after_another(full: None, http: httpx.Client) -> None:
    """With a free place every 10 s, refused requests get `Retry-After` 10, 20 and so on, at most
    60."""
    told = [int(http.post("/prompt").headers["retry-after"]) for _ in range(10)]
    for number, seconds in enumerate(told, 1):
        assert min(number, 6) * PLACE_S - 5 <= seconds <= min(number, 6) * PLACE_S


def test_refusals_are_counted_for_the_metrics(
    full: None, engine: Engine, http: httpx.Client
) -> None:
    """The next request that passes has their number, and a client cannot forge it."""
    for _ in range(5):
        http.post("/prompt", headers={REFUSED: "1000"})
    engine.is_full = False
    engine.released.set()
    until(lambda: http.post("/prompt", headers={REFUSED: "1000"}).status_code == 200)
    http.post("/prompt")
    counts = [int(headers[REFUSED]) for headers in engine.headers]
    assert sum(counts) >= 5
    assert counts[-1] == 0
    http.post("/tokenize", headers={REFUSED: "1000"})
    assert REFUSED not in engine.headers[-1]


def test_only_what_generates_is_refused(full: None, engine: Engine, http: httpx.Client) -> None:
    """Status routes and other POSTs pass."""
    assert http.get("/health").status_code == http.get("/prompt").status_code == 200
    engine.is_full = False
    engine.released.set()
    assert http.post("/tokenize").status_code == 200


def test_a_refusal_reads_no_body(full: None, server: Server) -> None:
    """A client gets its refusal after the headers of an 8 MB body, before it sends the body."""
    head = b"POST /prompt HTTP/1.1\r\nHost: a\r\nContent-Length: 8000000\r\n\r\n{"
    with server.connect() as connection:
        connection.sendall(head)
        assert connection.recv(12) == b"HTTP/1.1 429"


def test_places_that_become_free_are_taken(full: None, engine: Engine, http: httpx.Client) -> None:
    """HAProxy accepts a request after each end, although the queue was reported full for ten
    minutes."""
    engine.is_full = False
    engine.released.set()
    until(lambda: http.post("/prompt").status_code == 200)


def half_sent(server: Server, stack: ExitStack, path: bytes, size: int) -> None:
    """Opens as many requests as there are places, each with `size` bytes of a longer body."""
    head = b"POST %s HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % (path, size + 1)
    for _ in range(NUM_PLACES):
        stack.enter_context(server.connect()).sendall(head + b"{" * size)


@pytest.mark.parametrize("path", [b"/prompt", b"/ping"])
def test_half_sent_bodies_take_nothing_of_the_limit(
    server: Server, engine: Engine, http: httpx.Client, path: bytes
) -> None:
    """Half-sent bodies wait in HAProxy without using the limit, so each other request is answered
    at once."""
    http.get("/ping")
    engine.released.set()
    with ExitStack() as stack:
        half_sent(server, stack, path, 1000)
        for _ in range(50):
            assert http.post("/prompt").status_code == 200


def test_connections_without_a_place_do_not_block_others(
    server: Server, engine: Engine, http: httpx.Client
) -> None:
    """Half-sent bodies that HAProxy cannot hold are more than the places: others still pass."""
    http.get("/ping")
    engine.released.set()
    with ExitStack() as stack:
        half_sent(server, stack, b"/prompt", 100_000)
        for _ in range(10):
            until(lambda: http.post("/prompt").status_code == 200)


def test_without_a_number_nothing_is_refused(
    engine: Engine, http: httpx.Client, threads: ThreadPoolExecutor
) -> None:
    """Before a replica has sent its number of places, each request passes."""
    engine.open_requests(threads, http, 2 * NUM_PLACES)
    engine.released.set()
    assert {each.result().status_code for each in engine.opened} == {200}


def test_haproxy_knows_the_routes_that_generate() -> None:
    """HAProxy refuses requests for the routes that need a place in the engine's queue."""
    assert set(PATHS) == {route.path for route in ROUTES if route.generates}
