"""The HTTP door on a real socket, spoken to by the real openai client and by hand.

The engine is a script; the door, the server behind it and uvicorn are the real ones.
"""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from starlette.requests import ClientDisconnect

from serve_app.errors import EngineDead, OutOfMemory, QueueFull
from serve_app.ingress import create_app
from serve_app.server import MixtralServer
from tests.fakes import FakeEngine, server

HELLO: Any = [{"role": "user", "content": "Hello"}]
CHAT = {"messages": HELLO}


class Door:
    """A running uvicorn whose server a test may replace."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.server: MixtralServer = server()

    def serve(self, engine: FakeEngine | None = None, /, **args: Any) -> FakeEngine:
        """From now on this engine answers, with these settings."""
        engine = engine or FakeEngine()
        self.server = server(engine, **args)
        return engine

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def running() -> Iterator[Door]:
    """One uvicorn for all tests here, on a free port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        door = Door(f"http://127.0.0.1:{listener.getsockname()[1]}")
        config = uvicorn.Config(create_app(lambda: door.server), log_level="warning", ws="none")
        uvicorn_server = uvicorn.Server(config)
        thread = threading.Thread(target=uvicorn_server.run, args=([listener],))
        thread.start()
        yield door
        uvicorn_server.should_exit = True
        thread.join()


@pytest.fixture
def door(running: Door) -> Door:
    """The door, with an engine that says hello."""
    running.serve()
    return running


@pytest.fixture
def http(door: Door) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=door.url) as client:
        yield client


def test_the_openai_client_chats(door: Door) -> None:
    """The unmodified client gets the same answer whole and streamed, with its usage."""
    with door.client() as client:
        whole = client.chat.completions.create(model="tiny", messages=HELLO)
        stream = client.chat.completions.create(
            model="tiny", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert whole.choices[0].message.content == text == "Hello there."
    assert [c.choices[0].finish_reason for c in chunks[-2:-1]] == ["stop"]
    assert chunks[-1].usage == whole.usage
    assert whole.usage is not None
    assert whole.id.startswith("chatcmpl-")


def test_the_openai_client_completes(door: Door) -> None:
    """Completions for several prompts, whole and streamed."""
    with door.client() as client:
        whole = client.completions.create(model="tiny", prompt=["a", "b"])
        chunks = list(client.completions.create(model="tiny", prompt=["a", "b"], stream=True))
    texts = {0: "", 1: ""}
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert [choice.text for choice in whole.choices] == [texts[0], texts[1]]


def test_the_openai_client_lists_models(door: Door) -> None:
    """Models, and one model."""
    with door.client() as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").id == "tiny"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("other")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (QueueFull("Full.", retry_after_s=7), openai.RateLimitError, "queue_full"),
        (OutOfMemory("Full."), openai.InternalServerError, "out_of_memory"),
        (EngineDead("Dead."), openai.InternalServerError, "engine_dead"),
        (RuntimeError("secret"), openai.InternalServerError, "internal_error"),
    ],
)
def test_early_errors_keep_their_status(
    door: Door, stream: bool, error: Exception, kind: type[openai.APIStatusError], code: str
) -> None:
    """Before the first token a failure is a status, with Retry-After, also for a stream."""
    door.serve(FakeEngine("", error=error))
    with door.client() as client, pytest.raises(kind) as raised:
        client.chat.completions.create(model="tiny", messages=HELLO, stream=stream)
    assert raised.value.code == code
    wanted = "7" if code == "queue_full" else None
    assert raised.value.response.headers.get("retry-after") == wanted
    assert "secret" not in raised.value.response.text


def test_bad_requests_reach_the_client_with_their_param(door: Door) -> None:
    """The client's own exceptions, and the field that must change."""
    with door.client() as client:
        with pytest.raises(openai.BadRequestError) as bad:
            client.chat.completions.create(model="tiny", messages=HELLO, temperature=2.1)
        with pytest.raises(openai.BadRequestError) as tools:
            client.chat.completions.create(model="tiny", messages=HELLO, n=2)
        with pytest.raises(openai.NotFoundError) as model:
            client.chat.completions.create(model="gpt-5", messages=HELLO)
    assert [bad.value.param, tools.value.param, model.value.param] == ["temperature", "n", "model"]


def test_a_failure_in_a_stream_is_its_last_event(door: Door, http: httpx.Client) -> None:
    """The error is an event of its own, nothing follows, and the client raises it."""
    door.serve(FakeEngine(error=OutOfMemory("No memory.")))
    text = http.post("/v1/chat/completions", json={**CHAT, "stream": True}).text
    events = text.split("\n\n")
    assert events[-1] == ""
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "out_of_memory"
    assert "[DONE]" not in text
    with door.client() as client:
        stream = client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
        with pytest.raises(openai.APIError, match="No memory"):
            list(stream)


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/chat/completions", CHAT), ("/prompt", {"prompt": "Hi 你"})]
)
def test_a_stream_is_server_sent_events(http: httpx.Client, path: str, body: Any) -> None:
    """One `data:` line and a blank line for each chunk, `[DONE]` at the end, the right type."""
    response = http.post(path, json={**body, "stream": True})
    *events, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    assert all(isinstance(json.loads(event.removeprefix("data: ")), dict) for event in events)
    assert response.headers["content-type"].startswith("text/event-stream")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/prompt"])
def test_leaving_a_stream_frees_the_engine(door: Door, http: httpx.Client, path: str) -> None:
    """When the client closes the connection, the request ends."""
    engine = door.serve(FakeEngine(is_endless=True))
    body = CHAT if "chat" in path else {"prompt": "a"}
    with http.stream("POST", path, json={**body, "stream": True, "max_tokens": 500}) as response:
        received = response.iter_bytes()  # kept: an iterator that is collected closes the response
        next(received)
        assert engine.num_running == 1
    assert engine.left.wait(10)
    assert engine.num_running == 0


def test_a_socket_that_breaks_while_writing_frees_the_engine() -> None:
    """The request ends with the response, even when the client vanishes between two tokens."""
    engine = FakeEngine(is_endless=True)
    app = create_app(lambda: one)
    one = server(engine)
    body = json.dumps({"prompt": "a", "stream": True}).encode()
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "method": "POST",
        "path": "/prompt",
        "query_string": b"",
        "headers": [],
    }

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        if message.get("body"):
            raise OSError

    async def ask() -> None:
        with pytest.raises(ClientDisconnect):
            await app(scope, receive, send)
        assert engine.begun.is_set()
        assert engine.num_running == 0

    asyncio.run(ask())


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"nothing",
        b"\xff\xfe",
        b'{"temperature": NaN}',
        b'{"seed": ' + b"1" * 5000 + b"}",
        b"[" * 100_000,
        b"[]",
        b'"text"',
        b"",
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    ],
    ids=range(10),
)
def test_a_body_that_cannot_be_read(http: httpx.Client, content: bytes) -> None:
    """Each is a 400 in OpenAI's shape, and the next request is answered."""
    response = http.post("/v1/chat/completions", content=content)
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (400, "invalid_request_error")
    assert http.post("/prompt", json={"prompt": "Hi"}).status_code == 200


def test_a_body_over_the_limit_is_not_read(door: Door, http: httpx.Client) -> None:
    """413, whether the size is declared or only found out while reading."""
    door.serve(api={"max_body_bytes": 2000})
    declared = http.post("/prompt", content=b" " * 2001)
    chunked = http.post("/prompt", content=(b" " * 1000 for _ in range(50)))
    fits = http.post("/prompt", content=json.dumps({"prompt": "Hi"}).encode().ljust(2000))
    for response in (declared, chunked):
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "request_too_large"
    assert fits.status_code == 200


def test_unknown_routes_and_methods(http: httpx.Client) -> None:
    """404 and 405 in the one shape of errors; there are no documentation pages."""
    for method, path, status in (
        ("GET", "/", 404),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/prompt", 405),
        ("POST", "/health", 405),
        ("DELETE", "/v1/models/tiny", 405),
        ("TRACE", "/prompt", 405),
    ):
        response = http.request(method, path)
        assert response.status_code == status, (method, path)
        assert response.json()["error"]["status"] == "VALIDATION_FAILED"


def test_keys(door: Door, http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every route but the watchers' asks for one of the keys, as a bearer token."""
    monkeypatch.setenv("API_KEYS", "first, sécond")
    door.serve()
    for path in ("/health", "/ping"):
        assert http.get(path).status_code == 200
    for given in ("", "Bearer", "Bearer wrong", "first", "Basic first", "Bearer first, sécond"):
        response = http.get("/v1/models", headers={b"Authorization": given.encode()})
        assert response.status_code == 401, given
        assert response.json()["error"]["code"] == "invalid_api_key"
    for key in ("first", "sécond"):
        headers = {b"Authorization": f"bearer {key}".encode()}
        assert http.get("/v1/models", headers=headers).status_code == 200
    with door.client("first") as client:
        assert client.models.list().data
    with door.client("other") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_every_answer_has_an_id_of_ours(http: httpx.Client) -> None:
    """Header, error body and answer agree; a client's id is never taken for ours."""
    good = http.post("/v1/completions", json={"prompt": "a"})
    bad = http.post("/v1/completions", json={})
    given = http.post("/v1/completions", json={}, headers={"x-request-id": "mine"})
    assert good.json()["id"] == f"cmpl-{good.headers['x-request-id']}"
    assert bad.json()["error"]["request_id"] == bad.headers["x-request-id"]
    assert given.json()["error"]["request_id"] == given.headers["x-mixtral-request-id"] != "mine"
    assert len({each.headers["x-mixtral-request-id"] for each in (good, bad, given)}) == 3


def test_health_while_draining(door: Door, http: httpx.Client) -> None:
    """/health and /ping are 200 when ready and 503, still with their object, when draining."""
    assert http.get("/health").json()["status"] == "ready"
    assert http.get("/ping").status_code == 200
    door.server.drain()
    health = http.get("/health")
    assert (health.status_code, health.json()["status"]) == (503, "draining")
    refused = http.post("/prompt", json={"prompt": "a"})
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
