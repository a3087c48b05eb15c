"""The HTTP endpoint as it is deployed: real Ray Serve, the tiny model, real clients.

One private Ray for the module, on free ports. The text of answers is not judged here.
"""

import json
import socket
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from serve_app.machine.ports import free_port
from tests.exposition import Shown

pytestmark = pytest.mark.ray

HELLO: Any = [{"role": "user", "content": "What is 2 + 3?"}]
LONG = {"max_tokens": 12_000, "ignore_eos": True}
"""More tokens than any test waits for."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """`configs/tiny.yaml` behind Serve's own proxy."""
    import ray
    from ray import serve

    from serve_app.app import build_app
    from serve_app.config.settings import Settings

    port = free_port()
    ray.init(
        address="local",
        include_dashboard=False,
        object_store_memory=100_000_000,
        log_to_driver=False,
    )
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        serve.run(build_app(Settings.from_yaml("configs/tiny.yaml")), name="mixtral")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


def running(http: httpx.Client) -> tuple[int, int]:
    """Returns how many sequences run or wait, and how many KV blocks are in use."""
    engine = http.get("/health").json()["engine"]
    return engine["running"] + engine["waiting"], engine["kv_blocks_used"]


def ended(http: httpx.Client) -> Counter[str]:
    """Requests that have ended, by their reason."""
    return Counter(Shown(http.get("/metrics").text).by("finish_reason", "requests_total"))


def ask_and_leave(http: httpx.Client, url: str, path: str, stream: bool, headers: str = "") -> None:
    """Asks for a long answer and closes the connection once the request runs.

    `headers` are lines for the request.
    """
    body = {"stream": stream, **LONG, "prompt": "Hello"}
    if path == "/v1/chat/completions":
        body["messages"] = HELLO
        del body["prompt"]
    # By hand, because a client would wait for the answer before it could leave.
    address = (url.rpartition("/")[2].split(":")[0], int(url.rpartition(":")[2]))
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: test\r\n{headers}Content-Length: {len(content)}\r\n\r\n"
    with socket.create_connection(address) as connection:
        connection.sendall(head.encode() + content)
        while running(http)[0] == 0:
            pass


def wait_until_idle(http: httpx.Client) -> None:
    """Waits until nothing runs and no block is in use, long before `LONG` ends by itself."""
    started = time.monotonic()
    while running(http) != (0, 0):
        assert time.monotonic() - started < 10, "the request was never cancelled"


def test_the_openai_client_gets_one_answer_whole_and_streamed(client: openai.OpenAI) -> None:
    """Greedy, seeded or not, a streamed answer is the whole one; the usage is the same."""
    asked: Any = {"model": "tiny", "messages": HELLO, "temperature": 0, "max_tokens": 24}
    whole = client.chat.completions.create(**asked)
    stream = client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    seeded = [
        client.completions.create(model="tiny", prompt="Once", seed=7).choices[0].text
        for _ in range(2)
    ]
    assert seeded[0] == seeded[1]


def test_answers_are_openais_objects(http: httpx.Client) -> None:
    """Every JSON validates strictly against openai's own models."""
    chat = {"messages": HELLO, "max_tokens": 4, "logprobs": True, "top_logprobs": 3}
    ChatCompletion.model_validate_json(http.post("/v1/chat/completions", json=chat).content)
    completion = {"prompt": ["a", "b"], "max_tokens": 4, "logprobs": 2}
    answer = http.post("/v1/completions", json=completion)
    Completion.model_validate_json(answer.content, strict=True)
    text = http.post("/v1/chat/completions", json={**chat, "stream": True}).text
    *events, done, _ = text.split("\n\n")
    assert done == "data: [DONE]"
    for event in events:
        ChatCompletionChunk.model_validate_json(event.removeprefix("data: "), strict=True)


def test_a_stream_arrives_as_it_is_made(http: httpx.Client) -> None:
    """The first text is here while the engine still works on the rest."""
    body = {"messages": HELLO, "stream": True, **LONG}
    with http.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()
        assert json.loads(next(lines).removeprefix("data: "))["choices"][0]["delta"]["role"]
        assert running(http)[0] == 1
    wait_until_idle(http)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/prompt"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks(
    http: httpx.Client, url: str, path: str, stream: bool
) -> None:
    """Streaming or not, a closed connection ends the request and returns its KV blocks."""
    before = ended(http)
    ask_and_leave(http, url, path, stream)
    wait_until_idle(http)
    assert ended(http) - before == {"cancelled": 1}


BAD: list[tuple[str, Any, int, str | None]] = [
    ("/v1/chat/completions", b"{", 400, None),
    ("/v1/chat/completions", b"[]", 400, None),
    ("/v1/chat/completions", {"messages": "Hello"}, 400, "messages"),
    ("/v1/chat/completions", {"messages": HELLO, "colour": 1}, 400, "colour"),
    ("/v1/chat/completions", {"messages": HELLO, "tools": [{}]}, 400, "tools.0.type"),
    ("/v1/chat/completions", {"messages": [{"role": "system", "content": "a"}]}, 400, "messages"),
    ("/v1/chat/completions", {"messages": HELLO, "model": "gpt"}, 404, "model"),
    ("/prompt", {"prompt": ""}, 400, "prompt"),
    ("/prompt", {"prompt": "a" * 100_001}, 400, "prompt"),
    ("/prompt", {"prompt": "é" * 10_000}, 400, "prompt"),
    ("/prompt", {"prompt": "a", "temperature": 2.1}, 400, "temperature"),
    ("/prompt", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
    ("/prompt", {"prompt": "a", "max_tokens": 16_384}, 400, "max_tokens"),
    ("/v1/completions", {"prompt": [5, 9999]}, 400, "prompt"),
    ("/v1/embeddings", {"input": "a"}, 404, None),
    ("/prompt", b" " * 8_000_001, 413, None),
]


@pytest.mark.parametrize(("path", "body", "status", "param"), BAD, ids=range(len(BAD)))
def test_bad_input_does_not_disturb_other_requests(
    http: httpx.Client, path: str, body: Any, status: int, param: str | None
) -> None:
    """Bad input gets an error body of the usual form, and the next request is answered."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = http.post(path, content=content)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param)
    assert (error["type"], error["status"]) == ("invalid_request_error", "VALIDATION_FAILED")
    assert http.post("/prompt", json={"prompt": "a", "max_tokens": 1}).status_code == 200


def test_the_pages_are_there(http: httpx.Client) -> None:
    """Serve's own proxy passes the page, its policy and the description on."""
    page = http.get("/")
    assert page.text.startswith("<!doctype html>")
    assert "connect-src 'self'" in page.headers["content-security-policy"]
    assert "/prompt" in http.get("/openapi.json").json()["paths"]


def test_the_replica_tells_how_it_is(http: httpx.Client) -> None:
    """/health has the model, its memory and the load, from the replica itself."""
    health = http.get("/health").json()
    assert health["status"] == "ready"
    assert health["memory"]["experts"] > 1_000_000
    assert [phase["phase"] for phase in health["load"]][-1] == "ready"


def test_the_load_is_in_the_replicas_log(http: httpx.Client) -> None:
    """Our own lines are in Serve's log; what users write is not."""
    from ray._private.worker import global_worker

    http.post("/prompt", json={"prompt": "unmistakable words", "max_tokens": 1})
    logs = Path(global_worker.node.get_session_dir_path(), "logs", "serve")
    written = "".join(log.read_text() for log in logs.glob("replica_mixtral*.log"))
    assert "Cold start: read" in written
    assert "unmistakable" not in written


def check_ids(http: httpx.Client) -> None:
    """Serve sets x-request-id itself; ours does not make it two, and is equal without a client's.

    The log has a line about a client's id only where a client sent one.
    """
    ids = []
    for given in ({}, {}, {"x-request-id": "mine"}, {"x-request-id": str(uuid.uuid4())}):
        response = http.post("/prompt", json={}, headers=given)
        ours = response.headers["x-mixtral-request-id"]
        assert response.json()["error"]["request_id"] == ours
        assert response.headers["x-request-id"] == given.get("x-request-id", ours)
        assert ours not in given.values()
        ids.append(ours)
    assert len(set(ids)) == 4


def test_a_request_has_one_id_header(http: httpx.Client) -> None:
    """Headers, error and log of a request have one id, behind Serve's own proxy."""
    check_ids(http)


def test_serves_log_names_the_route_of_each_request(http: httpx.Client) -> None:
    """Proxy and replica write the real path, and no line that says nothing about a request."""
    from ray._private.worker import global_worker

    answered = http.post("/tokenize", json={"prompt": "a"})
    model = http.get("/v1/models/tiny")
    folder = Path(global_worker.node.get_session_dir_path(), "logs", "serve")
    started = time.monotonic()
    for pattern in ("proxy_*.log", "replica_mixtral*.log"):
        lines: list[str] = []
        # Serve writes a line after the answer is sent.
        while not any(model.headers["x-request-id"] in line for line in lines):
            assert time.monotonic() - started < 10, "the line was never written"
            written = "".join(log.read_text() for log in folder.glob(pattern))
            lines = written.splitlines()
        assert any("GET /v1/models/{id:path} 200" in line for line in lines)
        (line,) = [line for line in lines if answered.headers["x-request-id"] in line]
        assert "POST /tokenize 200" in line


def test_the_handle_gives_what_http_gives(url: str, http: httpx.Client) -> None:
    """The deployment handle, which the RunPod worker calls: answers and errors are data."""
    from ray import serve

    handle = serve.get_app_handle("mixtral").options(stream=True)

    def call(path: str, body: Any) -> list[Any]:
        return list(handle.call.remote("POST", path, body, "r1"))

    body = {"prompt": "What is 2 + 3?", "temperature": 0, "max_tokens": 8}
    (answer,) = call("/prompt", body)
    assert answer["status"] == 200
    assert answer["body"] == http.post("/prompt", json=body).json()
    (refused,) = call("/prompt", {"prompt": "a", "temperature": 3})
    over_http = http.post("/prompt", json={"prompt": "a", "temperature": 3}).json()
    same = {**over_http["error"], "request_id": "r1"}
    assert (refused["status"], refused["error"]["error"]) == (400, same)
    chunks = call("/prompt", {**body, "stream": True})
    assert "".join(c["chunk"]["token"] for c in chunks) == answer["body"]["text"]


@pytest.mark.parametrize("stream", [True, False])
def test_cancelling_through_the_handle_frees_the_blocks(
    url: str, http: httpx.Client, stream: bool
) -> None:
    """The RunPod worker does this when a job is stopped."""
    from ray import serve

    handle = serve.get_app_handle("mixtral").options(stream=True)
    body = {"prompt": "Hello", "stream": stream, **LONG}
    response = handle.call.remote("POST", "/prompt", body, "r1")
    while running(http)[0] == 0:
        pass
    response.cancel()
    wait_until_idle(http)
