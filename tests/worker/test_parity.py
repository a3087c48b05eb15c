"""The same body over HTTP and as a job: the same answer, and the same error."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.machine.ports import free_port
from tests.exposition import Shown
from tests.worker.conftest import Client, until
from tests.worker.process import ENTRY, environment

pytestmark = pytest.mark.ray

OWN = {"id", "item_id", "created", "created_at", "request_id"}
"""Fields that differ from request to request."""
OWN |= {"prompt_tokens_details", "input_tokens_details"}  # what the prefix cache had
GREEDY = {"temperature": 0, "max_tokens": 16}
SCORED = {"max_tokens": 0, "logprobs": 20}
MESSAGES = [{"role": "user", "content": "What is 2 + 3?"}]
CHAT = {"model": "tiny", "messages": MESSAGES, **GREEDY}
RESPONSE = {"model": "tiny", "input": "What is 2 + 3?", "temperature": 0, "max_output_tokens": 16}
MESSAGE = {"model": "tiny", "messages": MESSAGES, **GREEDY}
PLACE = {"type": "object", "properties": {"place": {"enum": ["a", "b"]}}, "required": ["place"]}
CALL = {
    **CHAT,
    "tools": [{"type": "function", "function": {"name": "look", "parameters": PLACE}}],
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "max_tokens": 60,
}
RESULT = [
    *MESSAGES,
    {
        "role": "assistant",
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "look"}}],
    },
    {"role": "tool", "tool_call_id": "1", "content": "5"},
]


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of the HTTP server of the same entry point, which ends with code 0 on SIGTERM."""
    home: Path = tmp_path_factory.mktemp("http-home")
    port = free_port()
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(ENTRY)],
            cwd=home,
            env=environment(home, RUNPOD_SERVERLESS="false", PORT=str(port)),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        until(lambda: f"Serving HTTP on http://127.0.0.1:{port}" in (home / "log").read_text())
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield client
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    assert code == 0, (home / "log").read_text()


def anonymous(value: Any) -> Any:
    """Returns `value` without the fields that differ from request to request."""
    if isinstance(value, dict):
        return {name: anonymous(item) for name, item in value.items() if name not in OWN}
    if isinstance(value, list):
        return [anonymous(item) for item in value]
    return value


def events_of(text: str) -> list[Any]:
    """Returns the chunks of an event stream, without its [DONE]."""
    events = [event.removeprefix("data: ") for event in text.split("\n\n") if event]
    return [anonymous(json.loads(event)) for event in events if event != "[DONE]"]


def text_of(events: list[Any]) -> str:
    return "".join(event["choices"][0]["delta"].get("content", "") for event in events)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/prompt", {"prompt": "What is 2 + 3?", **GREEDY}),
        ("POST", "/prompt", {"prompts": ["One?", "Two?"], **GREEDY}),
        ("POST", "/prompt", {"prompt": "Say it", "temperature": 1, "seed": 7, "max_tokens": 16}),
        ("POST", "/v1/chat/completions", CHAT),
        ("POST", "/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2}),
        ("POST", "/v1/chat/completions", {**CHAT, "n": 2, "temperature": 2, "seed": 3}),
        ("POST", "/v1/completions", {"prompt": ["a", "b c"], "echo": True, **SCORED}),
        ("POST", "/v1/completions", {"prompt": [1, 5, 6], "prompt_logprobs": 2, **SCORED}),
        ("POST", "/v1/chat/completions", CALL),
        ("POST", "/v1/chat/completions", {**CHAT, "messages": RESULT}),
        ("POST", "/v1/completions", {"model": "tiny", "prompt": "2 + 3", **GREEDY}),
        ("POST", "/v1/responses", RESPONSE),
        ("POST", "/v1/messages", MESSAGE),
        ("POST", "/v1/messages/count_tokens", {"messages": MESSAGES}),
        ("POST", "/tokenize", {"prompt": "Hello, world"}),
        ("POST", "/detokenize", {"tokens": [5, 6, 7]}),
        ("GET", "/v1/models", None),
        ("GET", "/v1/models/tiny", None),
    ],
)
def test_answers_are_equal(
    http: httpx.Client, client: Client, method: str, path: str, body: Any
) -> None:
    """The answers are equal in every token and field."""
    answer = http.request(method, path, json=body)
    assert answer.status_code == 200, answer.text
    job = client.ended({"route": path, "method": method, "body": body})
    assert job.status == "COMPLETED", job.error
    assert anonymous(job.output) == anonymous(answer.json())


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/prompt", {"prompt": ""}, 400),
        ("POST", "/prompt", {"prompt": "x", "temperature": 2.1}, 400),
        ("POST", "/prompt", {"prompt": "x", "max_tokens": 0}, 400),
        ("POST", "/prompt", {"prompt": "x", "colour": 1}, 400),
        ("POST", "/prompt", {"prompt": "x" * 100_001}, 400),
        ("POST", "/prompt", {"prompt": "x " * 20_000, "max_tokens": 16_000}, 400),
        ("POST", "/prompt", {"prompt": "x" * 8_000_000}, 413),
        ("POST", "/prompt", [1], 400),
        ("POST", "/prompt", {}, 400),
        ("GET", "/prompt", None, 405),
        ("POST", "/v1/chat/completions", {**CHAT, "model": "other"}, 404),
        ("POST", "/v1/chat/completions", {**CHAT, "tools": [{}]}, 400),
        ("POST", "/v1/chat/completions", {**CALL, "tool_choice": "one"}, 400),
        ("POST", "/v1/chat/completions", {"model": "tiny"}, 400),
        ("POST", "/v1/responses", {**RESPONSE, "store": True}, 400),
        ("POST", "/v1/messages", {**MESSAGE, "model": "other"}, 404),
        ("POST", "/v1/messages", {**MESSAGE, "thinking": {"type": "enabled"}}, 400),
        ("GET", "/v1/messages", None, 405),
        ("POST", "/nowhere", {"a": 1}, 404),
        ("GET", "/v1/models/other", None, 404),
    ],
)
def test_errors_are_equal(
    http: httpx.Client, client: Client, method: str, path: str, body: Any, status: int
) -> None:
    """The job's error string is the HTTP body except for the request id."""
    answer = http.request(method, path, json=body)
    assert answer.status_code == status, answer.text
    job = client.ended({"route": path, "method": method, "body": body})
    assert job.status == "FAILED"
    assert anonymous(client.error_of(job)) == anonymous(answer.json())


def test_metrics_are_equal(http: httpx.Client, client: Client) -> None:
    """All three ways show the same series except for counts of HTTP responses; a job's request is
    counted like one over HTTP."""

    def job(given: Any) -> Shown:
        ended = client.ended(given)
        assert ended.status == "COMPLETED", ended.error
        text = ended.output
        return Shown(text[0] if "openai_route" in given else text)

    body = {"prompt": "What is 2 + 3?", **GREEDY}
    befores = job({"route": "/metrics"}), Shown(http.get("/metrics").text)
    assert client.ended({"endpoint": "/prompt", "data": body}).status == "COMPLETED"
    assert http.post("/prompt", json=body).status_code == 200
    afters = job({"openai_route": "/metrics"}), Shown(http.get("/metrics").text)
    shown = [
        frozenset(it for it in each.series if "http_requests_total" not in str(it))
        for each in (*befores, *afters)
    ]
    assert len(set(shown)) == 1
    for name in ("request_prompt_tokens_sum", "request_generation_tokens_sum"):
        by_job, by_http = (b(name) - a(name) for a, b in zip(befores, afters, strict=True))
        assert by_job == by_http > 0


def test_plain_streams_are_equal(http: httpx.Client, client: Client) -> None:
    """`/prompt` streams the same text and the same last chunk, however chunks were merged."""
    body = {"prompt": "What is 2 + 3?", "stream": True, **GREEDY}
    events = events_of(http.post("/prompt", json=body).text)
    chunks = client.ended(body).output
    assert "".join(c["token"] for c in chunks) == "".join(e["token"] for e in events)
    assert chunks[-1] == events[-1]


def test_streams_are_equal(http: httpx.Client, client: Client) -> None:
    """The gateway's text is HTTP's event stream with its [DONE], however chunks were merged."""
    body = {**CHAT, "stream": True}
    events = http.post("/v1/chat/completions", json=body).text
    job = client.ended({"openai_route": "/v1/chat/completions", "openai_input": body})
    one, other = events_of(events), events_of("".join(job.output))
    assert text_of(one) == text_of(other)
    # The role first and the reason last, each in a chunk of its own.
    assert (one[0], one[-1]) == (other[0], other[-1])
    assert events.endswith("data: [DONE]\n\n")
    assert job.output[-1].endswith("data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages", MESSAGE),
        ("/v1/messages", {**MESSAGE, "tools": [{"name": "now", "input_schema": {}}],
                          "tool_choice": {"type": "tool", "name": "now"}}),
        ("/v1/responses", RESPONSE),
        ("/v1/responses", {**RESPONSE, "tools": [{"type": "function", "name": "now"}],
                           "tool_choice": {"type": "function", "name": "now"}}),
    ],
)  # fmt: skip
def test_typed_streams_are_equal(http: httpx.Client, client: Client, path: str, body: Any) -> None:
    """The gateway's text is HTTP's stream of named events, which has no [DONE]; a job of another
    shape has the same events as objects. Only how the text is cut may differ."""
    body = {**body, "stream": True}
    # After a first time, the prompt is in the prefix cache of both, and usage counts that.
    http.post(path, json=body)
    client.ended({"endpoint": path, "data": body})
    events = joined(named(http.post(path, json=body).text))
    gateway = client.ended({"openai_route": path, "openai_input": body})
    assert joined(named("".join(gateway.output))) == events
    plain = client.ended({"endpoint": path, "data": body})
    assert joined(plain.output) == events


def named(text: str) -> list[Any]:
    """Returns the events of a stream, each of which has its type as its name."""
    events = []
    for event in text.removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def joined(events: list[Any]) -> list[Any]:
    """Returns the events without their numbers, those with a piece of text replaced by one text."""
    text = ""
    others = []
    for event in events:
        match event.get("delta"):
            case str(piece) | {"text": str(piece)} | {"partial_json": str(piece)}:
                text += piece
            case _:
                others.append({**event, "sequence_number": 0})
    return [*anonymous(others), text]


def test_streams_with_calls_are_equal(http: httpx.Client, client: Client) -> None:
    """The pieces of a call are the same call over HTTP and as a job."""

    def call_of(events: list[Any]) -> tuple[str, str]:
        deltas = [event["choices"][0]["delta"].get("tool_calls", []) for event in events]
        functions = [call["function"] for calls in deltas for call in calls]
        return functions[0]["name"], "".join(each["arguments"] for each in functions)

    body = {**CALL, "stream": True}
    one = events_of(http.post("/v1/chat/completions", json=body).text)
    job = client.ended({"openai_route": "/v1/chat/completions", "openai_input": body})
    other = events_of("".join(job.output))
    data = client.ended({"endpoint": "/v1/chat/completions", "data": body}).output
    assert call_of(one) == call_of(other) == call_of(data)
    assert json.loads(call_of(one)[1])["place"] in ("a", "b")
    assert one[-1] == other[-1] == anonymous(data[-1])
    assert one[-1]["choices"][0]["finish_reason"] == "tool_calls"
