"""`/v1/messages` and its `count_tokens`, with Anthropic's own client and models."""

import logging
from typing import Any

import anthropic
import httpx
import pytest
from anthropic.types import Message, MessageTokensCount, RawMessageStreamEvent
from pydantic import BaseModel

from serve_app.errors import OutOfMemory, QueueFull
from tests.api.conftest import Endpoint
from tests.api.named_events import events_of
from tests.fakes import FakeEngine
from tests.validated import validated

PATH = "/v1/messages"
QUESTION: Any = [{"role": "user", "content": "What is 2 + 3?"}]
ASKED: Any = {"model": "tiny", "max_tokens": 16, "messages": QUESTION}
GREEDY: Any = {**ASKED, "extra_body": {"temperature": 0}}  # the client has no such argument


def test_the_client_gets_the_same_message_whole_and_streamed(tiny_endpoint: Endpoint) -> None:
    """The tiny model's answer, with its usage and the id of the request."""
    with tiny_endpoint.anthropic() as client:
        whole = client.messages.create(**GREEDY)
        with client.messages.stream(**GREEDY) as stream:
            text = "".join(stream.text_stream)
            streamed = stream.get_final_message()
    assert [block.type for block in whole.content] == ["text"]
    assert [b.text for b in whole.content if b.type == "text"] == [text]
    assert [b.text for b in streamed.content if b.type == "text"] == [text]
    assert (whole.usage, whole.stop_reason) == (streamed.usage, streamed.stop_reason)
    assert whole.usage.output_tokens > 0
    assert whole.id == f"msg_{whole._request_id}"


def test_a_message_is_one_of_anthropics_models(http: httpx.Client) -> None:
    """No field is missing and none is unknown."""
    message: Message = validated(Message, http.post(PATH, json=ASKED).json())
    assert (message.role, message.stop_reason) == ("assistant", "end_turn")


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("text", ["Hello there.", ""])
def test_events_are_anthropics_models_in_order(
    endpoint: Endpoint, http: httpx.Client, text: str, size: int
) -> None:
    """The events validate and come in the protocol's order, however the text was cut."""
    endpoint.serve(FakeEngine(text, size=size))
    events = events_of(http.post(PATH, json={**ASKED, "stream": True}))
    assert events.pop(1) == {"type": "ping"}
    for event in events:
        validated(RawMessageStreamEvent, event)
    deltas = [e["delta"]["text"] for e in events if e["type"] == "content_block_delta"]
    assert "".join(deltas) == text
    block = ["content_block_start", *["content_block_delta"] * len(deltas), "content_block_stop"]
    assert [event["type"] for event in events] == [
        "message_start",
        *(block if text else []),
        "message_delta",
        "message_stop",
    ]


@pytest.mark.parametrize(
    ("fields", "reason", "stop", "text"),
    [
        ({}, "end_turn", None, "Hello there."),
        ({"stop_sequences": ["x", "the", "there"]}, "stop_sequence", "the", "Hello "),
        ({"stop_sequences": ["x"]}, "end_turn", None, "Hello there."),
    ],
)
def test_the_reason_says_why_the_answer_ended(
    http: httpx.Client, fields: Any, reason: str, stop: str | None, text: str
) -> None:
    """A stop sequence is named, whole and streamed, and is no part of the text."""
    whole = http.post(PATH, json={**ASKED, **fields}).json()
    events = events_of(http.post(PATH, json={**ASKED, **fields, "stream": True}))
    (delta,) = [event["delta"] for event in events if event["type"] == "message_delta"]
    assert delta == {"stop_reason": reason, "stop_sequence": stop}
    assert {name: whole[name] for name in delta} == delta
    assert whole["content"] == [{"type": "text", "text": text}]


def test_the_limit_is_max_tokens(tiny_endpoint: Endpoint) -> None:
    """`max_tokens` ends the answer, with its own reason."""
    with tiny_endpoint.anthropic() as client:
        message = client.messages.create(**{**GREEDY, "max_tokens": 1})
    assert (message.stop_reason, message.usage.output_tokens) == ("max_tokens", 1)


def test_system_and_blocks_make_the_prompt_of_chat(endpoint: Endpoint, http: httpx.Client) -> None:
    """The prompt's token ids are those of the same conversation in OpenAI's API."""
    engine = endpoint.serve()
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "One"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "x"},
                {"type": "text", "text": "1", "citations": None},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Two", "cache_control": {"type": "ephemeral"}},
                {"type": "text", "text": "Three"},
            ],
        },
    ]
    system = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    count = http.post(f"{PATH}/count_tokens", json={"system": system, "messages": turns}).json()
    used = http.post(PATH, json={**ASKED, "system": system, "messages": turns}).json()["usage"]
    http.post(PATH, json={**ASKED, "system": "Be brief.", "messages": turns})
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Two\nThree"},
    ]
    http.post("/v1/chat/completions", json={"messages": chat})
    prompts = [prompt_ids for prompt_ids, _ in engine.requests]
    assert prompts == [prompts[0]] * 3
    assert count == {"input_tokens": len(prompts[0])}
    assert used["input_tokens"] == len(prompts[0])


def test_the_client_counts_tokens(endpoint: Endpoint) -> None:
    """`count_tokens` of the client agrees with the usage of the answer."""
    with endpoint.anthropic() as client:
        count = client.messages.count_tokens(model="tiny", messages=QUESTION, system="Be brief.")
        message = client.messages.create(**ASKED, system="Be brief.")
    validated(MessageTokensCount, count.to_dict())
    assert count.input_tokens == message.usage.input_tokens


def test_a_last_message_of_the_assistant_is_continued(tiny_endpoint: Endpoint) -> None:
    """The answer is what follows it, as with chat's `continue_final_message`."""
    begun: Any = [*QUESTION, {"role": "assistant", "content": "2 + 3"}]
    with tiny_endpoint.anthropic() as client, tiny_endpoint.client() as chat:
        message = client.messages.create(**{**GREEDY, "messages": begun})
        counted = client.messages.count_tokens(model="tiny", messages=begun)
        with client.messages.stream(**{**GREEDY, "messages": begun}) as stream:
            streamed = stream.get_final_text()
        options = {"continue_final_message": True, "add_generation_prompt": False}
        other = chat.chat.completions.create(
            model="tiny", messages=begun, temperature=0, max_tokens=16, extra_body=options
        )
    (block,) = message.content
    assert block.type == "text"
    assert block.text == streamed == other.choices[0].message.content
    assert block.text.startswith(" =")
    assert other.usage is not None
    assert other.usage.prompt_tokens == counted.input_tokens


def test_cached_tokens_are_counted_apart(tiny_endpoint: Endpoint) -> None:
    """The prompt's tokens are those of the cache and the others, whole and from the first event."""
    long: Any = [{"role": "user", "content": "Name the colours of the rainbow, please. " * 4}]
    with tiny_endpoint.anthropic() as client:
        count = client.messages.count_tokens(model="tiny", messages=long).input_tokens
        asked = {**ASKED, "messages": long, "max_tokens": 2}
        first = client.messages.create(**asked).usage
        again = client.messages.create(**asked).usage
        start = next(iter(client.messages.create(**asked, stream=True)))
    assert (first.input_tokens, first.cache_read_input_tokens) == (count, 0)
    for usage in (again, start.message.usage):
        assert usage.cache_read_input_tokens > 0
        assert usage.input_tokens + usage.cache_read_input_tokens == count


def test_sampling_fields_reach_the_engine(endpoint: Endpoint, http: httpx.Client) -> None:
    """The fields of the Messages API mean what their names in OpenAI's API mean."""
    engine = endpoint.serve()
    http.post(PATH, json={**ASKED, "temperature": 0.5, "top_p": 0.9, "top_k": 7})
    http.post(
        "/v1/chat/completions",
        json={"messages": QUESTION, "max_tokens": 16, "temperature": 0.5, "top_p": 0.9, "top_k": 7},
    )
    one, other = (params for _, params in engine.requests)
    assert one == other


class Sum(BaseModel):
    total: int


def test_the_client_parses_a_message(tiny_endpoint: Endpoint) -> None:
    """`messages.parse` sends a JSON schema, which the answer follows."""
    with tiny_endpoint.anthropic() as client:
        parsed = client.messages.parse(**{**ASKED, "max_tokens": 64}, output_format=Sum)
    assert isinstance(parsed.parsed_output, Sum)


@pytest.mark.parametrize(
    "fields",
    [
        {"metadata": {"user_id": "u"}, "service_tier": "auto", "cache_control": None},
        {"cache_control": {"type": "ephemeral"}, "inference_geo": "us", "speed": "fast"},
        {"thinking": {"type": "disabled"}, "tools": [], "tool_choice": {"type": "auto"}},
        {"thinking": {"type": "adaptive"}, "output_config": {"effort": "high"}},
        {"thinking": {"type": "adaptive", "display": "omitted"}},
        {"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}},
        {"mcp_servers": [], "container": None},
    ],
)
def test_what_changes_nothing_passes(http: httpx.Client, fields: Any) -> None:
    """Fields of the documented list, and values that ask for what happens anyway."""
    response = http.post(f"{PATH}?beta=true", json={**ASKED, **fields})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages.0.content"),
        ({"messages": [*QUESTION, {"role": "assistant", "content": " "}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "It is"}]}, "messages"),
        ({"system": [{"type": "image", "source": {}}]}, "system.0.type"),
        ({"temperature": 2.5}, "temperature"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"stop": ["x"]}, "stop"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        (
            {"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}},
            "context_management.edits",
        ),
        ({"mcp_servers": [{"type": "url"}]}, "mcp_servers"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type"),
        ({"colour": 1}, "colour"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    http: httpx.Client, fields: Any, param: str
) -> None:
    """A 400 in Anthropic's shape names the field."""
    response = http.post(PATH, json={**ASKED, **fields})
    body = response.json()
    assert response.status_code == 400, response.text
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    assert body["error"]["param"] == param
    assert param.rpartition(".")[2] in body["error"]["message"] or "." in param


def test_an_image_is_refused_by_its_name(endpoint: Endpoint) -> None:
    """The client raises its own exception, with a sentence that names the block's type."""
    image: Any = {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1/x.png"}}
    with endpoint.anthropic() as client, pytest.raises(anthropic.BadRequestError) as raised:
        client.messages.create(**{**ASKED, "messages": [{"role": "user", "content": [image]}]})
    assert "`image`" in str(raised.value)
    assert raised.value.type == "invalid_request_error"
    assert raised.value.request_id


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "kind", "name"),
    [
        (QueueFull("Full.", retry_after_s=7), anthropic.RateLimitError, "rate_limit_error"),
        (OutOfMemory("Full."), anthropic.InternalServerError, "api_error"),
        (RuntimeError("secret"), anthropic.InternalServerError, "api_error"),
    ],
)
def test_early_errors_have_a_status_and_anthropics_shape(
    endpoint: Endpoint, stream: bool, error: Exception, kind: Any, name: str
) -> None:
    """Before the first token a failure is a status, also for a stream."""
    endpoint.serve(FakeEngine("", error=error))
    with endpoint.anthropic() as client, pytest.raises(kind) as raised:
        client.messages.create(**ASKED, stream=stream)
    assert raised.value.body["type"] == "error"
    assert raised.value.body["error"]["type"] == name
    assert raised.value.body["request_id"] == raised.value.request_id
    assert "secret" not in raised.value.response.text


def test_a_failure_in_a_stream_is_its_last_event(endpoint: Endpoint, http: httpx.Client) -> None:
    """An event named `error`, which the client raises; nothing follows."""
    endpoint.serve(FakeEngine(error=OutOfMemory("No memory.")))
    last = events_of(http.post(PATH, json={**ASKED, "stream": True}))[-1]
    assert (last["type"], last["error"]["type"]) == ("error", "api_error")
    with endpoint.anthropic() as client, pytest.raises(anthropic.APIStatusError) as raised:
        list(client.messages.create(**ASKED, stream=True))
    assert "No memory." in str(raised.value)


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "name"),
    [
        ("GET", PATH, None, 405, "invalid_request_error"),
        ("POST", f"{PATH}/batches", b"{}", 404, "not_found_error"),
        ("POST", PATH, b"{", 400, "invalid_request_error"),
        ("POST", PATH, b'{"a": "' + b"x" * 9_000_000 + b'"}', 413, "request_too_large"),
        (
            "POST",
            f"{PATH}/count_tokens",
            b'{"model": "other", "messages": [{"role": "user", "content": "x"}]}',
            404,
            "not_found_error",
        ),
    ],
)
def test_errors_below_the_path_have_anthropics_shape(
    http: httpx.Client, method: str, path: str, content: bytes | None, status: int, name: str
) -> None:
    """Errors of routing, of the body and of the model have the shape too."""
    response = http.request(method, path, content=content)
    body = response.json()
    assert (response.status_code, body["type"], body["error"]["type"]) == (status, "error", name)
    for header in ("x-mixtral-request-id", "request-id"):
        assert body["request_id"] == response.headers[header]


def test_a_key_may_come_as_x_api_key(
    endpoint: Endpoint,
    http: httpx.Client,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Anthropic's clients send the key so; it is in no log, and a wrong one is a 401."""
    monkeypatch.setenv("API_KEYS", "first, my-secret")
    endpoint.serve()
    with caplog.at_level(logging.DEBUG, logger="serve_app"):
        with endpoint.anthropic("my-secret") as client:
            assert client.messages.create(**ASKED).stop_reason == "end_turn"
        assert http.get("/v1/models", headers={"x-api-key": "my-secret"}).status_code == 200
        with endpoint.anthropic("my-secrets") as client:
            with pytest.raises(anthropic.AuthenticationError) as raised:
                client.messages.create(**ASKED)
    assert raised.value.type == "authentication_error"
    both = {"x-api-key": "my-secret", "authorization": "Bearer wrong"}
    assert http.post(PATH, json=ASKED, headers=both).status_code == 401
    assert "my-secret" not in caplog.text
