"""Tools of `/v1/messages`, with Anthropic's own client and models, checked by jsonschema."""

import json
from typing import Any

import anthropic
import httpx
import jsonschema
import pytest
from anthropic.types import Message, RawMessageStreamEvent

from tests.api.conftest import Endpoint
from tests.api.named_events import events_of
from tests.api.test_messages import PATH
from tests.fakes import FakeEngine
from tests.validated import validated

PARIS = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
}
WEATHER: Any = {"name": "get_weather", "description": "The weather.", "input_schema": PARIS}
NOW: Any = {"name": "now", "input_schema": {"type": "object"}, "type": "custom"}
QUESTION: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
ASKED: Any = {
    "model": "tiny",
    "max_tokens": 120,
    "messages": QUESTION,
    "tools": [WEATHER, NOW],
}
GREEDY: Any = {**ASKED, "extra_body": {"temperature": 0}}
CALLS = (
    'I look. [TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}},'
    ' {"name": "now", "arguments": {}}]'
)
USED: Any = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Rome"}}
RESULT: Any = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "sun"}


@pytest.mark.parametrize("size", [1, 3, 100])
def test_calls_are_content_blocks(endpoint: Endpoint, http: httpx.Client, size: int) -> None:
    """Text and calls are blocks one after another, the same in a message and from its events."""
    endpoint.serve(FakeEngine(CALLS, size=size))
    whole: Message = validated(Message, http.post(PATH, json=ASKED).json())
    events = events_of(http.post(PATH, json={**ASKED, "stream": True}))
    for event in events:
        if event["type"] != "ping":
            validated(RawMessageStreamEvent, event)
    blocks = [event["type"] for event in events if event["type"].startswith("content_block_s")]
    assert blocks == ["content_block_start", "content_block_stop"] * 3
    with endpoint.anthropic() as client, client.messages.stream(**ASKED) as stream:
        streamed = stream.get_final_message()
    for message in (whole, streamed):
        assert message.stop_reason == "tool_use"
        assert [(block.type, getattr(block, "input", None)) for block in message.content] == [
            ("text", None),
            ("tool_use", {"city": "Paris"}),
            ("tool_use", {}),
        ]
    ids = [block.id for block in whole.content if block.type == "tool_use"]
    assert len(set(ids)) == 2
    assert all(each.startswith("toolu_") for each in ids)


def test_a_call_that_is_cut_says_so(endpoint: Endpoint, http: httpx.Client) -> None:
    """The pieces of a stream end early; a whole message leaves the call out, which no client should
    run."""
    cut = CALLS[: CALLS.index('"Paris"') + 4]
    endpoint.serve(FakeEngine(cut, reason="length"))
    whole = http.post(PATH, json=ASKED).json()
    assert whole["stop_reason"] == "max_tokens"
    assert whole["content"] == [{"type": "text", "text": "I look."}]
    events = events_of(http.post(PATH, json={**ASKED, "stream": True}))
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    pieces = "".join(each.get("partial_json", "") for each in deltas)
    assert pieces == cut[cut.index('{"city"') :]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ({"type": "any"}, {"get_weather", "now"}),
        ({"type": "any", "disable_parallel_tool_use": True}, {"get_weather", "now"}),
        ({"type": "tool", "name": "now"}, {"now"}),
        ({"type": "tool", "name": "get_weather"}, {"get_weather"}),
    ],
)
def test_a_call_that_is_asked_for_is_valid(
    tiny_endpoint: Endpoint, choice: Any, names: set[str], stream: bool
) -> None:
    """The tiny model calls the tools that it may call, with arguments of their schema."""
    with tiny_endpoint.anthropic() as client:
        if stream:
            with client.messages.stream(**GREEDY, tool_choice=choice) as events:
                message: Any = events.get_final_message()
        else:
            message = client.messages.create(**GREEDY, tool_choice=choice)
    calls = message.content
    assert {call.type for call in calls} == {"tool_use"}
    assert {call.name for call in calls} <= names
    if len(choice) > 1:
        assert (message.stop_reason, len(calls)) == ("tool_use", 1)
    is_cut = stream and message.stop_reason == "max_tokens"
    for call in calls[: -1 if is_cut else None]:
        jsonschema.validate(call.input, PARIS if call.name == "get_weather" else {})


def test_the_client_loops(tiny_endpoint: Endpoint) -> None:
    """A call is sent back with its result as the client holds it, and is answered; the tokens of
    the prompt are those that `count_tokens` says, with those of the cache."""
    with tiny_endpoint.anthropic() as client:
        first = client.messages.create(**GREEDY, tool_choice={"type": "tool", "name": "now"})
        (call,) = first.content
        assert call.type == "tool_use"
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "noon"}
        messages = [
            *QUESTION,
            {"role": "assistant", "content": first.content},
            {"role": "user", "content": [result]},
        ]
        prompt: Any = {"model": "tiny", "messages": messages, "tools": [WEATHER, NOW]}
        count = client.messages.count_tokens(**prompt)
        answer = client.messages.create(**prompt, max_tokens=8)
    used = answer.usage
    assert used.input_tokens + (used.cache_read_input_tokens or 0) == count.input_tokens
    assert count.input_tokens > first.usage.input_tokens


def test_the_prompt_is_that_of_chat(endpoint: Endpoint, http: httpx.Client) -> None:
    """Tools, calls and results give the token ids of the same conversation in OpenAI's API."""
    engine = endpoint.serve()
    texts = [{"type": "text", "text": "sun"}, {"type": "text", "text": "wind"}]
    failed = {**RESULT, "tool_use_id": "toolu_2", "content": texts, "is_error": True}
    messages = [
        *QUESTION,
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "I look."},
                USED,
                {**USED, "id": "toolu_2", "name": "now", "input": {}},
            ],
        },
        {"role": "user", "content": [RESULT, failed, {"type": "text", "text": "And?"}]},
    ]
    http.post(PATH, json={**ASKED, "messages": messages})
    calls = [("toolu_1", "get_weather", {"city": "Rome"}), ("toolu_2", "now", {})]
    chat = [
        *QUESTION,
        {
            "role": "assistant",
            "content": "I look.",
            "tool_calls": [
                {
                    "id": each,
                    "type": "function",
                    "function": {"name": name, "arguments": json.dumps(value)},
                }
                for each, name, value in calls
            ],
        },
        {"role": "tool", "tool_call_id": "toolu_1", "content": "sun"},
        {"role": "tool", "tool_call_id": "toolu_2", "content": "Error: sun\nwind"},
        {"role": "user", "content": "And?"},
    ]
    tools = [
        {
            "type": "function",
            "function": {"name": "get_weather", "description": "The weather.", "parameters": PARIS},
        },
        {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}},
    ]
    response = http.post("/v1/chat/completions", json={"messages": chat, "tools": tools})
    assert response.status_code == 200, response.text
    (one, _), (other, _) = engine.requests
    assert one == other


def test_a_result_may_be_empty(http: httpx.Client) -> None:
    """A tool that returns nothing has a result without content, or with null."""
    contents: list[Any] = [{}, {"content": None}, {"content": []}, {"content": ""}]
    for content in contents:
        result = {"type": "tool_result", "tool_use_id": "toolu_1", **content}
        messages = [
            *QUESTION,
            {"role": "assistant", "content": [USED]},
            {"role": "user", "content": [result]},
        ]
        response = http.post(PATH, json={**ASKED, "messages": messages})
        assert response.status_code == 200, response.text


def test_tools_that_may_not_be_called_are_not_called(tiny_endpoint: Endpoint) -> None:
    """With `none` the answer is text, whatever the question."""
    with tiny_endpoint.anthropic() as client:
        message = client.messages.create(**GREEDY, tool_choice={"type": "none"})
    assert [block.type for block in message.content] in ([], ["text"])


SEARCH: Any = {"type": "web_search_20250305", "name": "web_search"}


@pytest.mark.parametrize(
    ("fields", "param", "word"),
    [
        ({"tools": [SEARCH]}, "tools.0.type", "web_search_20250305"),
        ({"tools": [{"name": "x"}]}, "tools.0.input_schema", "required"),
        ({"tools": [{**WEATHER, "name": "a b"}]}, "tools.0", "name"),
        ({"tools": [WEATHER, WEATHER]}, "tools.1", "get_weather"),
        ({"tools": [{**WEATHER, "input_schema": {"type": "array"}}]}, "tools.0.input_schema",
         "object"),
        ({"tool_choice": {"type": "tool", "name": "other"}}, "tool_choice", "other"),
        ({"tool_choice": "any"}, "tool_choice", "`any`"),
        ({"tools": [], "tool_choice": {"type": "any"}}, "tool_choice", "`tools`"),
        ({"messages": [*QUESTION, {"role": "assistant", "content": [USED]},
                       {"role": "user", "content": "And?"}]}, "messages", "toolu_1"),
        ({"messages": [{"role": "user", "content": [RESULT]}]}, "messages.0.content", "toolu_1"),
        ({"messages": [*QUESTION, {"role": "assistant", "content": [USED, USED]},
                       {"role": "user", "content": [RESULT]}]}, "messages.1.content", "one id"),
        ({"messages": [{"role": "user", "content": [USED]}]}, "messages.0.content", "assistant"),
        ({"messages": [*QUESTION, {"role": "assistant", "content": [RESULT]}]},
         "messages.1.content", "user"),
        ({"messages": [*QUESTION, {"role": "assistant", "content": [USED]}, {"role": "user",
          "content": [{**RESULT, "content": [{"type": "image"}]}]}]},
         "messages.2.content.0.content.0.type", "image"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_by_name(
    http: httpx.Client, fields: Any, param: str, word: str
) -> None:
    """A 400 says which tool, choice or block is wrong."""
    response = http.post(PATH, json={**ASKED, **fields})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert word in error["message"]


def test_the_client_gets_a_refusal(endpoint: Endpoint) -> None:
    """A tool that Anthropic's servers run is refused by its type."""
    with endpoint.anthropic() as client, pytest.raises(anthropic.BadRequestError, match="web_s"):
        client.messages.create(**{**ASKED, "tools": [SEARCH]})
