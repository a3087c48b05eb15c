"""The real openai client, streams, and clients that close their connection."""

import asyncio
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from ray.exceptions import TaskCancelledError
from starlette.requests import ClientDisconnect

from serve_app.api.ingress import create_app
from serve_app.errors import EngineDead, OutOfMemory, QueueFull
from tests.api.conftest import Endpoint
from tests.fakes import FakeEngine, server

HELLO: Any = [{"role": "user", "content": "Hello"}]
CHAT = {"messages": HELLO}


def scope(method: str, path: str, spec_version: str = "2.4") -> dict[str, Any]:
    """Returns a request as an HTTP server hands it to the app; uvicorn follows version 2.3 of
    ASGI."""
    asgi = {"version": "3.0", "spec_version": spec_version}
    head = {"type": "http", "asgi": asgi, "method": method, "path": path}
    return {**head, "query_string": b"", "headers": []}


def test_the_openai_client_chats(endpoint: Endpoint) -> None:
    """The unmodified client gets the same answer whole and streamed, with its usage."""
    with endpoint.client() as client:
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


def test_the_openai_client_completes(endpoint: Endpoint) -> None:
    """Completions for several prompts, whole and streamed."""
    with endpoint.client() as client:
        whole = client.completions.create(model="tiny", prompt=["a", "b"])
        chunks = list(client.completions.create(model="tiny", prompt=["a", "b"], stream=True))
    texts = {0: "", 1: ""}
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert [choice.text for choice in whole.choices] == [texts[0], texts[1]]


def test_the_openai_client_lists_models(endpoint: Endpoint) -> None:
    """Models, and one model."""
    with endpoint.client() as client:
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
    endpoint: Endpoint,
    stream: bool,
    error: Exception,
    kind: type[openai.APIStatusError],
    code: str,
) -> None:
    """Before the first token a failure is a status, with Retry-After, also for a stream."""
    endpoint.serve(FakeEngine("", error=error))
    with endpoint.client() as client, pytest.raises(kind) as raised:
        client.chat.completions.create(model="tiny", messages=HELLO, stream=stream)
    assert raised.value.code == code
    wanted = "7" if code == "queue_full" else None
    assert raised.value.response.headers.get("retry-after") == wanted
    assert "secret" not in raised.value.response.text


def test_bad_requests_reach_the_client_with_their_param(endpoint: Endpoint) -> None:
    """The client's own exceptions, and the field that must change."""
    with endpoint.client() as client:
        with pytest.raises(openai.BadRequestError) as bad:
            client.chat.completions.create(model="tiny", messages=HELLO, temperature=2.1)
        with pytest.raises(openai.BadRequestError) as tools:
            client.chat.completions.create(model="tiny", messages=HELLO, n=129)
        with pytest.raises(openai.NotFoundError) as model:
            client.chat.completions.create(model="gpt-5", messages=HELLO)
    assert [bad.value.param, tools.value.param, model.value.param] == ["temperature", "n", "model"]


def test_a_failure_in_a_stream_is_its_last_event(endpoint: Endpoint, http: httpx.Client) -> None:
    """The error is an event of its own, nothing follows, and the client raises it."""
    endpoint.serve(FakeEngine(error=OutOfMemory("No memory.")))
    text = http.post("/v1/chat/completions", json={**CHAT, "stream": True}).text
    events = text.split("\n\n")
    assert events[-1] == ""
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "out_of_memory"
    assert "[DONE]" not in text
    with endpoint.client() as client:
        stream = client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
        with pytest.raises(openai.APIError, match="No memory"):
            list(stream)


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/chat/completions", CHAT), ("/prompt", {"prompt": "Hi 你"})]
)
def test_a_stream_is_server_sent_events(http: httpx.Client, path: str, body: Any) -> None:
    """One `data:` line and a blank line for each chunk, `[DONE]` at the end, the right headers."""
    response = http.post(path, json={**body, "stream": True})
    *events, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    assert all(isinstance(json.loads(event.removeprefix("data: ")), dict) for event in events)
    assert response.headers["content-type"].startswith("text/event-stream")
    # nginx buffers a stream, and a cache keeps it, unless these two say otherwise.
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["cache-control"] == "no-cache"


def test_events_are_lines_for_every_client(endpoint: Endpoint, http: httpx.Client) -> None:
    """Text with Unicode's own line ends arrives whole where a client uses `str.splitlines`."""
    text = "a\u2028b\u2029c\u0085d"
    body = {"prompt": text, "echo": True, "stream": True, "max_tokens": 3}
    with http.stream("POST", "/v1/completions", json=body) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines.pop() == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert chunks[0]["choices"][0]["text"].startswith(text)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/prompt"])
def test_leaving_a_stream_frees_the_engine(
    endpoint: Endpoint, http: httpx.Client, path: str
) -> None:
    """When the client closes the connection, the request ends."""
    engine = endpoint.serve(FakeEngine(is_endless=True))
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

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        if message.get("body"):
            raise OSError

    async def ask() -> None:
        with pytest.raises(ClientDisconnect):
            await app(scope("POST", "/prompt"), receive, send)
        assert engine.begun.is_set()
        assert engine.num_running == 0

    asyncio.run(ask())


def test_leaving_in_mid_upload_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    """A client that leaves before its body is complete starts nothing and logs nothing."""
    engine = FakeEngine()
    app = create_app(lambda: one)
    one = server(engine)
    parts: list[dict[str, Any]] = [
        {"type": "http.request", "body": b'{"prompt": "my secr', "more_body": True},
        {"type": "http.disconnect"},
    ]

    async def receive() -> dict[str, Any]:
        return parts.pop(0)

    async def send(message: Any) -> None:
        pass

    with caplog.at_level(logging.INFO):
        asyncio.run(app(scope("POST", "/prompt"), receive, send))
    assert not parts
    assert not engine.requests
    assert not caplog.records


@pytest.mark.parametrize("num_parts", [0, 1], ids=["before the body", "in the stream"])
def test_a_read_that_serve_cancels_is_a_client_that_left(
    caplog: pytest.LogCaptureFixture, num_parts: int
) -> None:
    """Serve's `receive` raises when its proxy drops a client: nothing of it is logged or counted
    as an error, and the request ends."""
    engine = FakeEngine(is_endless=True)
    one = server(engine)
    app = create_app(lambda: one)
    body = json.dumps({"prompt": "a", "stream": True}).encode()
    parts = [{"type": "http.request", "body": body, "more_body": False}][:num_parts]
    begun = asyncio.Event()
    sent: list[Any] = []

    async def receive() -> Any:
        if parts:
            return parts.pop()
        if num_parts:
            await begun.wait()
        raise TaskCancelledError

    async def send(message: Any) -> None:
        sent.append(message)
        if message.get("body"):
            begun.set()

    with caplog.at_level(logging.INFO):
        asyncio.run(app(scope("POST", "/prompt", "2.3"), receive, send))
    assert sent[0]["status"] == (200 if num_parts else 499)
    assert len(engine.requests) == num_parts
    assert engine.num_running == 0
    assert one.metrics.finished["cancelled"] == num_parts
    assert not any(one.metrics._errors.values())
    assert not caplog.records


def test_the_example_prints_an_answer_and_a_mistake(endpoint: Endpoint) -> None:
    """`examples/openai_http.py`, as a newcomer runs it."""
    example = Path(__file__).parents[2] / "examples" / "openai_http.py"
    done = subprocess.run(
        [sys.executable, str(example), f"{endpoint.url}/v1"],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "Hello there."
    assert second.startswith("An error names the field and says what to change: messages: ")
