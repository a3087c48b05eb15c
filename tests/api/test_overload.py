"""More requests than places: refused before the body is read; lists are admitted as a whole."""

import asyncio
import json
from typing import Any

import pytest

from serve_app.api import early_answer
from serve_app.api.early_answer import EarlyAnswer
from serve_app.api.ingress import create_app
from serve_app.api.list_places import ListPlaces
from serve_app.api.server import MixtralServer
from serve_app.protocol.header_names import PLACES, REFUSED
from tests.fakes import MAX_TAKEN, FakeEngine, answer, items, server

LIMITS = b"64,6400,50000,3"
"""The fake engine's header for HAProxy."""
GENERATE = ["/prompt", "/v1/completions", "/v1/chat/completions", "/v1/messages"]


async def post(
    one: MixtralServer, path: str, method: str = "POST", headers: Any = (), app: Any = None
) -> tuple[int, dict[bytes, bytes], Any]:
    """Status, headers and body of a request whose body must not be read."""
    sent: list[Any] = []

    async def receive() -> Any:
        raise AssertionError("the body was read")

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": [*headers]}
    scope |= {"query_string": b"", "root_path": "", "http_version": "1.1"}
    early_answer.serves(one)
    await (app or create_app(lambda: one))(scope, receive, send)
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], dict(sent[0]["headers"]), json.loads(body)


@pytest.mark.parametrize("path", GENERATE)
def test_a_full_queue_refuses_before_the_body_is_read(path: str) -> None:
    """A full queue refuses a request with Retry-After, without reading, parsing or tokenizing its
    body."""
    engine = FakeEngine()
    engine.num_taken = MAX_TAKEN
    status, headers, body = asyncio.run(post(server(engine), path))
    assert (status, headers[b"retry-after"], body["error"]["code"]) == (429, b"3", "queue_full")


@pytest.mark.parametrize("path", [*GENERATE, "/tokenize"])
def test_a_draining_server_refuses_before_the_body_is_read(path: str) -> None:
    """While the server shuts down every POST gets its 503 at once."""
    one = server()
    one.drain()
    status, headers, body = asyncio.run(post(one, path))
    assert (status, body["error"]["code"]) == (503, "draining")
    assert b"retry-after" in headers


@pytest.mark.parametrize("path", ["/ping", "/health", "/v1/models", "/tokenizer_info"])
def test_a_full_queue_refuses_nothing_but_generation(path: str) -> None:
    """Status routes answer beside a full queue, and read no body either."""
    engine = FakeEngine()
    engine.num_taken = MAX_TAKEN
    assert asyncio.run(post(server(engine), path, "GET"))[0] == 200


async def _serve(scope: Any, receive: Any, send: Any) -> None:
    """Stands for Serve's own server, behind the early answers."""
    await send({"type": "http.response.start", "status": 299, "headers": []})
    await send({"type": "http.response.body", "body": b"{}"})


def early(one: MixtralServer, path: str, method: str = "POST", headers: Any = ()) -> Any:
    """Status, headers and body with the middleware around `_serve`."""
    return asyncio.run(post(one, path, method, headers, EarlyAnswer(_serve)))


@pytest.mark.parametrize("path", GENERATE)
def test_a_full_queue_refuses_before_serve_sees_the_request(path: str) -> None:
    """The refusal has the form, the id and the Retry-After of the ingress, and is counted."""
    engine = FakeEngine()
    one = server(engine)
    assert early(one, path)[0] == 299
    engine.num_taken = MAX_TAKEN
    status, headers, body = early(one, path, headers=[(b"x-request-id", b"mine")])
    assert (status, headers[b"retry-after"], body["error"]["code"]) == (429, b"3", "queue_full")
    assert headers[b"x-request-id"] == b"mine"
    assert headers[b"x-mixtral-request-id"].decode() == body["error"]["request_id"]
    is_messages = path == "/v1/messages"
    assert headers.get(b"request-id") == (headers[b"x-mixtral-request-id"] if is_messages else None)
    assert 'errors_total{code="queue_full",model_name="tiny"} 1.0' in one.metrics.text("ready")
    assert headers[PLACES.encode()] == LIMITS
    assert early(one, path, "GET")[0] == early(one, "/tokenize")[0] == 299


def test_an_early_refusal_has_the_shape_of_the_api() -> None:
    """The Messages API gets Anthropic's errors, early ones too."""
    engine = FakeEngine()
    engine.num_taken = MAX_TAKEN
    status, _, body = early(server(engine), "/v1/messages")
    assert (status, body["type"], body["error"]["type"]) == (429, "error", "rate_limit_error")


def test_ping_is_answered_before_serve_sees_it() -> None:
    """`/ping` needs no place in any queue, and its status is that of the server."""
    engine = FakeEngine()
    one = server(engine)
    engine.num_taken = MAX_TAKEN
    status, headers, body = early(one, "/ping", "GET")
    assert (status, body, headers[PLACES.encode()]) == (200, {"status": "ready"}, LIMITS)
    one.drain()
    assert early(one, "/ping", "GET")[::2] == (503, {"status": "draining"})
    dead = server(engine)
    engine.is_alive = False
    assert early(dead, "/ping", "GET")[2]["error"]["code"] == "engine_dead"


@pytest.mark.parametrize(
    ("told", "number"), [("7", 7), ("x", 0), ("-1", 0), ("9" * 400, 10**9 - 1)]
)
def test_refusals_of_haproxy_are_counted(told: str, number: int) -> None:
    """The number in the header of a request that passes is added to our own refusals."""
    one = server()
    headers = [(REFUSED.encode(), told.encode())]
    assert early(one, "/prompt", headers=headers)[0] == 299
    assert early(one, "/tokenize", headers=headers)[0] == 299
    text = one.metrics.text("ready")
    (line,) = (line for line in text.splitlines() if 'errors_total{code="queue_full"' in line)
    assert float(line.split()[1]) == number


def test_the_early_refusal_wants_the_key_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a client with a key learns that the queue is full."""
    monkeypatch.setenv("API_KEYS", "a")
    engine = FakeEngine()
    engine.num_taken = MAX_TAKEN
    assert early(server(engine), "/prompt")[0] == 401
    assert early(server(engine), "/prompt", headers=[(b"authorization", b"Bearer a")])[0] == 429


@pytest.mark.parametrize("path", ["/nothing", "/v1/nothing"])
def test_an_unknown_route_reads_no_body(path: str) -> None:
    """A request to an unknown path gets its 404 before the body is sent."""
    assert asyncio.run(post(server(), path))[0] == 404


def test_a_wrong_key_reads_no_body(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a valid key a request gets 401, also if the queue is full; its body is not read."""
    monkeypatch.setenv("API_KEYS", "a")
    engine = FakeEngine()
    engine.num_taken = MAX_TAKEN
    status, _, _ = asyncio.run(post(server(engine), "/prompt"))
    assert status == 401


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/prompt", {"prompts": ["Hi"] * 5}),
        ("/v1/completions", {"prompt": ["Hi"] * 5}),
        ("/v1/completions", {"prompt": ["Hi"] * 5, "stream": True}),
    ],
)
def test_a_list_is_refused_as_a_whole(path: str, body: Any) -> None:
    """A list that cannot begin is one 429, not a 200 with failed items."""
    engine = FakeEngine()
    engine.num_taken = MAX_TAKEN
    (item,) = asyncio.run(items(server(engine), path, body))
    assert (item["status"], item["error"]["error"]["code"]) == (429, "queue_full")
    assert not engine.requests
    assert engine.num_taken == MAX_TAKEN


def test_items_of_admitted_lists_are_never_refused() -> None:
    """20 lists of 100 prompts, ten times what the queue takes: every item is answered."""
    engine = FakeEngine()
    one = server(engine)

    async def run() -> list[Any]:
        bodies = [{"prompts": ["Hi"] * 100}] * 10
        wholes = [answer(one, "/prompt", body) for body in bodies]
        streams = [
            items(one, "/v1/completions", {"prompt": ["Hi"] * 100, "stream": True})
            for _ in range(10)
        ]
        return [*await asyncio.gather(*wholes, *streams)]

    answers = asyncio.run(run())
    for whole in answers[:10]:
        assert [result["text"] for result in whole["results"]] == ["Hello there."] * 100
    for stream in answers[10:]:
        ends = [
            choice["index"]
            for item in stream
            for choice in item["chunk"]["choices"]
            if choice["finish_reason"] == "stop"
        ]
        assert sorted(ends) == list(range(100))
    assert len(engine.requests) == 2000
    assert engine.max_num_seqs <= 32
    assert engine.num_taken == one.list_places.num_waiting == 0


def test_lists_leave_single_requests_their_pace() -> None:
    """Beside n single requests all lists together run max(n, a quarter of the batch) items."""
    engine = FakeEngine(is_endless=True)
    one = server(engine)

    async def run(num_single: int, num_lists: int) -> int:
        single = [
            asyncio.create_task(answer(one, "/prompt", {"prompt": "a"})) for _ in range(num_single)
        ]
        await until(lambda: engine.num_running == num_single)
        lists = [
            asyncio.create_task(answer(one, "/prompt", {"prompts": ["b"] * 50}))
            for _ in range(num_lists)
        ]
        await until(lambda: one.list_places.num_waiting > 0)
        for _ in range(50):
            await asyncio.sleep(0)
        num_items = engine.num_running - num_single
        for task in (*single, *lists):
            task.cancel()
        await asyncio.gather(*single, *lists, return_exceptions=True)
        assert engine.num_taken == 0
        return num_items

    assert asyncio.run(run(0, 2)) == 32
    assert asyncio.run(run(2, 2)) == 8
    assert asyncio.run(run(10, 2)) == 10
    assert asyncio.run(run(10, 1)) == 10


def test_lists_take_turns() -> None:
    """A short list beside a long one, which came first, ends after few of the long one's items."""
    one = server()
    places = ListPlaces(one._engine, 2)
    order: list[str] = []

    async def all_of(name: str, num_items: int) -> None:
        async def item(place: Any) -> None:
            async with place():
                await asyncio.sleep(0)
                order.append(name)

        async with places.admitted() as place:
            await asyncio.gather(*(item(place) for _ in range(num_items)))

    async def run() -> None:
        await asyncio.gather(all_of("long", 100), all_of("short", 3))

    asyncio.run(run())
    assert order.count("long") == 100
    assert len(order) - 1 - order[::-1].index("short") < 12


def test_a_cancelled_list_gives_its_places_back() -> None:
    """A client that leaves in the middle of a long list frees the running and the waiting items."""
    engine = FakeEngine(is_endless=True)
    one = server(engine)

    async def run() -> None:
        task = asyncio.create_task(answer(one, "/prompt", {"prompts": ["a"] * 100}))
        await until(lambda: engine.num_running == 32)
        assert one.health()["engine"]["waiting"] == 68
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert (engine.num_running, engine.num_taken, one.list_places.num_waiting) == (0, 0, 0)

    asyncio.run(run())


async def until(condition: Any) -> None:
    for _ in range(100_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("the condition stayed false")


def test_prompts_x_tokens_x_logprobs_has_a_limit() -> None:
    """256 prompts with 20 log probabilities for each of 256 tokens are refused before they run."""
    engine = FakeEngine()
    body = {"prompt": ["a"] * 256, "logprobs": 20, "max_tokens": 256}
    error = asyncio.run(answer(server(engine), "/v1/completions", body))["error"]
    assert (error["param"], engine.requests) == ("logprobs", [])
    assert "1,310,720; 1,000,000 are allowed" in error["message"]
