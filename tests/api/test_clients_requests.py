"""Requests that clients of comparable servers sent, over HTTP: encodings, CORS, ids, usage."""

import asyncio
import gzip
import json
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app import __version__
from serve_app.api import event_stream
from serve_app.api.ingress import create_app
from serve_app.config.key_file import ApiKey
from serve_app.errors import QueueFull
from serve_app.protocol.key_account import KeyAccount
from serve_app.worker.job import parse
from tests.api.conftest import Endpoint
from tests.fakes import FakeEngine, server

REQUESTS = [
    json.loads(line)
    for line in (Path(__file__).parent / "requests.jsonl").read_text("utf-8").splitlines()
]
HELLO = [{"role": "user", "content": "Hello"}]
STREAM = {"messages": HELLO, "stream": True, "stream_options": {"include_usage": True}}


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "deflate": zlib.compress,
    "raw deflate": raw_deflate,
    "bom": lambda data: b"\xef\xbb\xbf" + data,
}


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: request["id"])
def test_what_clients_send_is_answered(http: httpx.Client, request_: dict[str, Any]) -> None:
    """Each of these requests gets an answer."""
    if "job" in request_:
        call = parse(request_["job"], "r1", 10**6).call
        path, body = call.path, call.body
    else:
        path, body = request_["path"], request_["body"]
    content, headers = json.dumps(body).encode(), {}
    if (encoding := request_.get("encoding")) is not None:
        content = PACKERS[encoding](content)
        headers = {} if encoding == "bom" else {"content-encoding": encoding.split()[-1]}
    response = http.post(path, content=content, headers=headers)
    assert response.status_code == 200, response.text


def test_a_number_out_of_range_is_refused(http: httpx.Client) -> None:
    """`1e999`, which is JSON, becomes an infinity in JSON readers."""
    for name in ("temperature", "max_tokens"):
        content = b'{"prompt": "a", "%b": 1e999}' % name.encode()
        error = http.post("/v1/completions", content=content).json()["error"]
        assert error["message"] == f"`{name}` is a number out of range."


BOMB = gzip.compress(b" " * 8_000_001)


@pytest.mark.parametrize(
    ("encoding", "content", "status", "code"),
    [
        ("gzip", BOMB, 413, "request_too_large"),
        ("gzip", gzip.compress(b"{}")[:-9], 400, None),
        ("gzip", b"{}", 400, None),
        ("deflate", b"x\x9c{}", 400, None),
        ("br", b"{}", 415, "unsupported_encoding"),
        ("gzip, gzip", b"{}", 415, "unsupported_encoding"),
    ],
    ids=range(6),
)
def test_a_body_that_cannot_be_unpacked_is_refused(
    http: httpx.Client, encoding: str, content: bytes, status: int, code: str | None
) -> None:
    """Too large once unpacked, cut off, no such data, another encoding: each has its status."""
    response = http.post("/prompt", content=content, headers={"content-encoding": encoding})
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


def test_an_empty_body_may_have_any_encoding(http: httpx.Client) -> None:
    """Some clients set the header on every request."""
    assert http.get("/v1/models", headers={"content-encoding": "gzip"}).status_code == 200


def events(text: str) -> list[Any]:
    """Returns the JSON events of a stream."""
    *chunks, done, _ = text.split("\n\n")
    assert done == "data: [DONE]"
    return [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]


@pytest.mark.parametrize(
    ("path", "prompt"),
    [("/v1/chat/completions", {"messages": HELLO}), ("/v1/completions", {"prompt": "Hello"})],
)
def test_continuous_usage_counts_the_tokens_so_far(
    http: httpx.Client, path: str, prompt: dict[str, Any]
) -> None:
    """With `continuous_usage_stats` each chunk has the usage so far, as in vLLM; else null."""
    body = {**prompt, "stream": True, "stream_options": {"include_usage": True}}
    plain = events(http.post(path, json=body).text)
    assert [chunk["usage"] for chunk in plain[:-1]] == [None] * (len(plain) - 1)
    body["stream_options"]["continuous_usage_stats"] = True
    chunks = events(http.post(path, json=body).text)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] == (0 if "messages" in prompt else 1)
    assert chunks[-1]["usage"] == plain[-1]["usage"]
    assert counts[-1] > 2


def test_top_p_0_is_greedy(endpoint: Endpoint, http: httpx.Client) -> None:
    """It keeps the most probable token only, which is what temperature 0 does."""
    engine = endpoint.serve()
    http.post("/v1/completions", json={"prompt": "a", "top_p": 0, "temperature": 1.5})
    assert engine.requests[0][1].temperature == 0


def asgi(app: Any) -> httpx.AsyncClient:
    """Returns a client of an app in this process."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


PREFLIGHT = {
    "Origin": "http://localhost:3000",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}


@pytest.mark.parametrize("origins", [["*"], ["http://a.example", "http://localhost:3000"]])
def test_pages_of_allowed_origins_may_call(
    monkeypatch: pytest.MonkeyPatch, origins: list[str]
) -> None:
    """A preflight needs no key, the call itself does; its answers and errors can be read."""
    monkeypatch.setenv("API_KEYS", "secret")
    app = create_app(server, origins)

    async def check() -> None:
        async with asgi(app) as http:
            path, origin = "/v1/chat/completions", {"Origin": PREFLIGHT["Origin"]}
            asked = await http.options(path, headers=PREFLIGHT)
            assert asked.status_code == 200
            assert asked.headers["access-control-allow-origin"] in ("*", PREFLIGHT["Origin"])
            assert "authorization" in asked.headers["access-control-allow-headers"]
            assert "POST" in asked.headers["access-control-allow-methods"]
            assert asked.headers["x-mixtral-request-id"] == asked.headers["x-request-id"]
            refused = await http.post(path, json={"messages": HELLO}, headers=origin)
            assert refused.status_code == 401
            assert refused.headers["access-control-allow-origin"]
            key = {"Authorization": "Bearer secret"}
            told = await http.post(path, json={"messages": HELLO}, headers={**origin, **key})
            assert told.status_code == 200
            exposed = told.headers["access-control-expose-headers"].lower().split(", ")
            ids = {"x-request-id", "x-mixtral-request-id", "request-id"}
            limited = ApiKey(
                name="a", sha256="0" * 64, created=0, requests_per_minute=1, tokens_per_minute=1
            )
            limits = KeyAccount(limited, is_alone=True).headers().keys()
            assert set(exposed) == ids | {"retry-after"} | limits

    asyncio.run(check())


@pytest.mark.parametrize("origins", [[], ["http://a.example"]])
def test_pages_of_other_origins_may_not(origins: list[str]) -> None:
    """Without the setting, or from another origin, no header allows the call."""

    async def check() -> None:
        async with asgi(create_app(server, origins)) as http:
            asked = await http.options("/v1/chat/completions", headers=PREFLIGHT)
            assert asked.status_code in (400, 405)
            assert "access-control-allow-origin" not in asked.headers

    asyncio.run(check())


@pytest.mark.parametrize(
    ("given", "is_serves"),
    [
        ([], False),
        ([(b"x-request-id", b"mine"), (b"host", b"test")], False),
        ([(b"x-request-id", str(uuid.uuid4()).encode()), (b"content-length", b"0")], False),
        ([(b"host", b"test"), (b"x-request-id", str(uuid.uuid4()).encode())], True),
    ],
    ids=range(4),
)
def test_a_request_has_one_id(given: list[tuple[bytes, bytes]], is_serves: bool) -> None:
    """Headers and error have one id: ours, or the one that Ray Serve made and sends back itself."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/prompt",
        "query_string": b"",
        "headers": given,
    }
    asyncio.run(create_app(server)(scope, receive, send))
    headers = dict(sent[0]["headers"])
    ours = headers[b"x-mixtral-request-id"]
    assert json.loads(sent[1]["body"])["error"]["request_id"].encode() == ours
    assert headers.get(b"x-request-id", ours) == ours
    client_ids = [value for name, value in given if name == b"x-request-id"]
    assert (ours in client_ids) == is_serves


def test_a_stream_that_waits_sends_comments(
    endpoint: Endpoint, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proxies see a sign of life before the first token; clients read over it."""
    monkeypatch.setattr(event_stream, "KEEP_ALIVE_S", 0.01)

    class Waiting(FakeEngine):
        async def generate(self, *args: Any, **kwargs: Any) -> Any:
            await asyncio.sleep(0.05)  # stands for the queue
            async for delta in super().generate(*args, **kwargs):
                yield delta

    endpoint.serve(Waiting())
    text = http.post("/v1/chat/completions", json=STREAM).text
    comment, _, rest = text.partition("\n\n")
    assert comment == ": waiting"
    chunks = events(rest.replace(": waiting\n\n", ""))
    assert chunks[-1]["usage"]["completion_tokens"] == len(
        endpoint.server.tokenizer.encode("Hello there.", add_special_tokens=False)
    )
    asked: Any = {"model": "tiny", "messages": HELLO, "stream": True}
    whole: Any = endpoint.client().chat.completions.create(**asked)
    assert "".join(c.choices[0].delta.content or "" for c in whole) == "Hello there."


def test_a_full_queue_is_a_status_of_its_own(endpoint: Endpoint, http: httpx.Client) -> None:
    """An error before the first chunk is not an event: clients see a 429 and retry."""
    endpoint.serve(FakeEngine("", error=QueueFull("Full.", retry_after_s=3)))
    response = http.post("/v1/chat/completions", json=STREAM)
    assert (response.status_code, response.headers["retry-after"]) == (429, "3")


def test_a_context_overflow_has_openais_sentence(http: httpx.Client) -> None:
    """litellm and LangChain recognize the code and the beginning of the sentence."""
    for body in ({"prompt": "word " * 2000}, {"prompt": "a", "max_tokens": 10**6}):
        error = http.post("/v1/completions", json=body).json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert error["message"].startswith("This model's maximum context length is ")
        assert " tokens. However, your prompt " in error["message"] or "answer" in error["message"]


def test_version_and_tokenizer_info(http: httpx.Client) -> None:
    """vLLM's routes: the version, and what a client needs to render chats itself."""
    assert http.get("/version").json() == {"version": __version__}
    info = http.get("/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"]) == ("<s>", "</s>")
    assert "messages" in info["chat_template"]


def test_the_model_was_created_when_it_was_loaded(http: httpx.Client, endpoint: Endpoint) -> None:
    """Clients show the time, and 0 is 1970."""
    (model,) = http.get("/v1/models").json()["data"]
    assert model["created"] == endpoint.server.created > 1_600_000_000
