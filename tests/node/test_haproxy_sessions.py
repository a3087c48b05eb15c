"""HAProxy sends the requests of one conversation to one of several replicas."""

import csv
import json
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from serve_app.machine.ports import free_port
from serve_app.node import haproxy_program
from tests.node.test_haproxy_program import QuietServer, Server, haproxy, written
from tests.worker.conftest import until

NUM_REPLICAS = 4
KINDS = "chat|model first|system|parts|long|long answer|responses|prompt|cache key".split("|")
Body = dict[str, Any]


class Replica(BaseHTTPRequestHandler):
    """Answers with its port; a prompt "wait" is answered when `released` is set."""

    protocol_version = "HTTP/1.1"
    released = threading.Event()
    num_waiting = 0

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if b'"wait' in body:
            type(self).num_waiting += 1
            self.released.wait(30)
        self.answer()

    def answer(self) -> None:
        text = str(self.connection.getsockname()[1]).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None: ...


@contextmanager
def replicas(number: int) -> Iterator[list[int]]:
    with ExitStack() as stack:
        servers = [
            stack.enter_context(QuietServer(("127.0.0.1", 0), Replica)) for _ in range(number)
        ]
        for server in servers:
            threading.Thread(target=server.serve_forever, args=(0.02,)).start()
            stack.callback(server.shutdown)
        yield [server.server_port for server in servers]


@pytest.fixture(scope="module")
def ports() -> Iterator[list[int]]:
    with replicas(NUM_REPLICAS) as ports:
        yield ports


@pytest.fixture(scope="module")
def server(ports: list[int]) -> Iterator[Server]:
    with haproxy(*ports) as server:
        yield server


def chosen(
    server: Server,
    body: Body | bytes,
    path: str = "/v1/chat/completions",
    session: str = "",
    *,
    num_before: int | None = 0,
) -> int:
    """Returns the port of the replica that answered. Asks when HAProxy counts `num_before` other
    requests, or at once if that is None."""
    if num_before is not None:
        until(lambda: num_open(server) == num_before)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection = HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("POST", path, content, {"x-session-id": session} if session else {})
    answer = connection.getresponse()
    port = int(answer.read())
    connection.close()
    assert answer.status == 200
    return port


def num_open(server: Server) -> int:
    """Requests that HAProxy counts for its replicas."""
    with socket.socket(socket.AF_UNIX) as admin:
        admin.connect(str(server.folder / "admin.sock"))
        admin.sendall(b"show stat\n")
        table = b"".join(iter(lambda: admin.recv(65_536), b"")).decode()
    rows = csv.DictReader(table.removeprefix("# ").splitlines())
    return sum(int(row["scur"]) for row in rows if row["svname"].startswith("replica"))


def user(text: Any) -> Body:
    return {"role": "user", "content": text}


def turns(path: str, number: int) -> Iterator[Body]:
    """Yields the first turns of one conversation, as clients of `path` send them."""
    first, answer = (
        f"Question {number}? \n\u00e9\u4f60",
        {"role": "assistant", "content": "a" * 500},
    )
    parts = [{"type": "text", "text": first}]
    system = {"role": "system", "content": "Be brief."}
    match path:
        case "chat":
            yield from ({"messages": [user(first), *more]} for more in ([], [answer, user("b")]))
        case "model first":
            yield from ({"model": "m", "messages": [user(first), *more]} for more in ([], [answer]))
        case "system":
            yield from ({"messages": [system, user(first), *more]} for more in ([], [answer]))
        case "parts":
            yield from ({"messages": [system, user(parts), *more]} for more in ([], [answer]))
        case "long":
            long = user(first * 2_000)
            yield from ({"messages": [long, *more]} for more in ([], [answer]))
        case "long answer":
            answer["content"] *= 100
            yield from ({"messages": [user(first), *more]} for more in ([], [answer]))
        case "responses":
            yield from ({"input": [user(first), *more]} for more in ([], [answer]))
        case "prompt":
            text = first + " " + "x" * 300
            yield from ({"prompt": text + more} for more in ("", " and so on"))
        case "cache key":
            for more in ("a", "b"):
                yield {"messages": [user(more)], "prompt_cache_key": f"conversation {number}"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_stays_at_one_replica(server: Server, kind: str) -> None:
    """Each turn of a conversation meets the same replica, and conversations have several."""
    path = {"responses": "/v1/responses", "prompt": "/prompt"}.get(kind, "/v1/chat/completions")
    seen = []
    for number in range(12):
        (found,) = {chosen(server, body, path) for body in turns(kind, number)}
        seen.append(found)
    assert len(set(seen)) > 1


def test_the_header_goes_before_the_body(server: Server) -> None:
    """`x-session-id` decides, whatever the body says."""
    for session in map(str, range(8)):
        bodies = [{"prompt": str(each)} for each in range(6)]
        assert len({chosen(server, body, session=session) for body in bodies}) == 1
    # The ports, which a run chooses at random, decide the hashes: of 64 sessions one in 20 million
    # sets meets no request at one of the replicas.
    sessions = {chosen(server, {"prompt": ""}, session=str(each)) for each in range(64)}
    assert len(sessions) == NUM_REPLICAS


def test_conversations_are_spread(server: Server) -> None:
    """400 conversations are distributed over all replicas, and each gets at least half of an equal
    share."""
    found = Counter(chosen(server, {"prompt": f"{each} is the number."}) for each in range(400))
    assert len(found) == NUM_REPLICAS
    assert min(found.values()) > 400 / NUM_REPLICAS / 2


def test_bodies_that_are_no_json_pass(server: Server) -> None:
    """The replica answers them, as it would alone."""
    for body in (b"", b"{", b"\xff\x00", b"[" * 10_000, json.dumps({"messages": 3}).encode()):
        chosen(server, body)


def test_a_full_replica_gets_no_more(server: Server) -> None:
    """Forty requests of one conversation are spread, to at most a tenth more than the mean and
    one."""
    Replica.released.clear()
    Replica.num_waiting = 0
    try:
        with ThreadPoolExecutor(40) as threads:
            asked = [
                threads.submit(chosen, server, {"prompt": "wait"}, "/prompt", num_before=None)
                for _ in range(40)
            ]
            until(lambda: Replica.num_waiting == 40)
            Replica.released.set()
            found = Counter(each.result() for each in asked)
    finally:
        Replica.released.set()
    assert len(found) == NUM_REPLICAS
    assert max(found.values()) <= 10 * 1.1 + 1


def test_a_conversation_stays_where_it_went_first(server: Server, ports: list[int]) -> None:
    """If the replica of its hash is busy at first, another one keeps it; the hash decides again for
    a HAProxy that does not know it."""
    waiting = {"prompt": "wait for me"}
    Replica.released.clear()
    Replica.num_waiting = 0
    with haproxy(*ports) as other, ThreadPoolExecutor(1) as thread:
        try:
            asked = thread.submit(chosen, server, waiting, "/prompt", num_before=None)
            until(lambda: Replica.num_waiting == 1)
            bodies: list[Body] = [{"prompt": f"{each} stays"} for each in range(40)]
            first = [chosen(server, body, num_before=1) for body in bodies]
        finally:
            Replica.released.set()
        busy = asked.result()
        assert [chosen(server, body) for body in bodies] == first
        of_hash = [chosen(other, body) for body in bodies]
    assert busy in of_hash
    assert busy not in first
    assert all(a == b for a, b in zip(first, of_hash, strict=True) if b != busy)


def test_a_replica_that_leaves_moves_its_own_conversations_alone(ports: list[int]) -> None:
    """Conversations of the others stay where they were."""
    bodies = [{"prompt": f"{each}: a conversation"} for each in range(60)]
    with haproxy(*ports) as server:
        before = [chosen(server, body) for body in bodies]
    gone, *others = ports
    with haproxy(*reversed(others)) as server:
        after = [chosen(server, body) for body in bodies]
    kept = [(a, b) for a, b in zip(before, after, strict=True) if a != gone]
    assert kept
    assert all(a == b for a, b in kept)
    assert set(after) == set(others)


def test_one_replica_has_no_such_rules(tmp_path: Path, ports: list[int]) -> None:
    """With a single replica, HAProxy has no rules that read the body."""
    options, _ = haproxy_program.parse([])
    for number, has_rules in ((1, False), (2, True)):
        config = written(tmp_path, free_port(), *ports[:number]).read_text()
        assert ("txn.session" in haproxy_program.changed(config, options)) is has_rules
