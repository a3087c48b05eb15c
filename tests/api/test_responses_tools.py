"""Tools of `/v1/responses`, with OpenAI's own client and models, checked by jsonschema."""

import json
from typing import Any, Literal

import httpx
import jsonschema
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel

from tests.api.conftest import Endpoint
from tests.api.named_events import events_of
from tests.api.test_responses import PATH
from tests.fakes import FakeEngine
from tests.validated import validated

PARIS = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
}
WEATHER: Any = {"type": "function", "name": "get_weather", "parameters": PARIS, "strict": True}
NOW: Any = {"type": "function", "name": "now", "description": "The time."}
QUESTION = "What is the weather in Paris?"
ASKED: Any = {"model": "tiny", "input": QUESTION, "tools": [WEATHER, NOW]}
GREEDY: Any = {**ASKED, "temperature": 0, "max_output_tokens": 120}
CALLS = (
    'I look. [TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}},'
    ' {"name": "now", "arguments": {}}]'
)
CALLED: Any = {"type": "function_call", "call_id": "call_1", "name": "get_weather"}
CALL: Any = {**CALLED, "arguments": '{"city": "Rome"}'}
RESULT: Any = {"type": "function_call_output", "call_id": "call_1", "output": "sun"}
USER: Any = {"role": "user", "content": QUESTION}


def without_ids(items: Any) -> list[Any]:
    return [{**item, "id": None, "call_id": None} for item in items]


@pytest.mark.parametrize("size", [1, 3, 100])
def test_calls_are_items(endpoint: Endpoint, http: httpx.Client, size: int) -> None:
    """Text and calls are items one after another, the same in a response and from its events."""
    endpoint.serve(FakeEngine(CALLS, size=size))
    whole: Response = validated(Response, http.post(PATH, json=ASKED).json())
    events = events_of(http.post(PATH, json={**ASKED, "stream": True}))
    for number, event in enumerate(events):
        validated(ResponseStreamEvent, event)
        assert event["sequence_number"] == number
    assert [(item.type, getattr(item, "arguments", None)) for item in whole.output] == [
        ("message", None),
        ("function_call", '{"city": "Paris"}'),
        ("function_call", "{}"),
    ]
    last = events[-1]["response"]
    assert without_ids(last["output"]) == without_ids(
        whole.model_dump(exclude_unset=True)["output"]
    )
    assert [e["item"] for e in events if e["type"] == "response.output_item.done"] == last["output"]
    for index, item in enumerate(last["output"][1:], 1):
        names = [e["type"] for e in events if e.get("item_id") == item["id"]]
        assert set(names[:-1]) <= {"response.function_call_arguments.delta"}
        deltas = [e["delta"] for e in events if e.get("item_id") == item["id"] and "delta" in e]
        assert "".join(deltas) == item["arguments"]
        (done,) = [e for e in events if e["type"].endswith("arguments.done")][index - 1 : index]
        assert (done["arguments"], done["output_index"]) == (item["arguments"], index)
    assert (whole.tool_choice, len(whole.tools)) == ("auto", 2)


def test_the_stream_helper_gathers_calls(endpoint: Endpoint) -> None:
    """`responses.stream` of the client ends with the calls."""
    endpoint.serve(FakeEngine(CALLS))
    with endpoint.client() as client, client.responses.stream(**ASKED) as stream:
        response = stream.get_final_response()
    calls = [item for item in response.output if item.type == "function_call"]
    assert [json.loads(call.arguments) for call in calls] == [{"city": "Paris"}, {}]
    assert len({call.call_id for call in calls}) == 2


def test_a_call_that_is_cut_says_so(endpoint: Endpoint, http: httpx.Client) -> None:
    """The response and its last item are incomplete; the arguments end early."""
    cut = CALLS[: CALLS.index('"Paris"') + 4]
    endpoint.serve(FakeEngine(cut, reason="length"))
    whole = http.post(PATH, json=ASKED).json()
    assert [item["status"] for item in whole["output"]] == ["completed", "incomplete"]
    assert whole["output"][-1]["arguments"] == cut[cut.index('{"city"') :]
    last = events_of(http.post(PATH, json={**ASKED, "stream": True}))[-1]
    assert last["type"] == "response.incomplete"
    assert without_ids(last["response"]["output"]) == without_ids(whole["output"])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"tool_choice": "required"}, {"get_weather", "now"}),
        ({"tool_choice": "required", "parallel_tool_calls": False}, {"get_weather", "now"}),
        ({"tool_choice": {"type": "function", "name": "now"}}, {"now"}),
        (
            {
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "required",
                    "tools": [{"type": "function", "name": "get_weather"}],
                }
            },
            {"get_weather"},
        ),
    ],
)
def test_a_call_that_is_asked_for_is_valid(
    tiny_endpoint: Endpoint, fields: Any, names: set[str], stream: bool
) -> None:
    """The tiny model calls the tools that it may call, with arguments of their schema."""
    with tiny_endpoint.client() as client:
        if stream:
            *_, last = client.responses.create(**GREEDY, **fields, stream=True)
            response: Any = last.response
        else:
            response = client.responses.create(**GREEDY, **fields)
    validated(Response, response.to_dict())
    assert {item.type for item in response.output} == {"function_call"}
    assert {item.name for item in response.output} <= names
    for item in response.output[: None if response.status == "completed" else -1]:
        value = json.loads(item.arguments)
        jsonschema.validate(value, PARIS if item.name == "get_weather" else {"maxProperties": 0})
    if "parallel_tool_calls" in fields or names == {"now"}:
        assert len(response.output) == 1


class Weather(BaseModel):
    """The weather in a city."""

    city: Literal["Paris", "Rome"]


def test_the_client_parses_calls(tiny_endpoint: Endpoint) -> None:
    """`responses.parse` with a pydantic model as a tool."""
    tool = openai.pydantic_function_tool(Weather)
    with tiny_endpoint.client() as client:
        response: Any = client.responses.parse(
            model="tiny",
            input=QUESTION,
            tools=[tool],
            tool_choice={"type": "function", "name": "Weather"},
            temperature=0,
        )
    (call,) = response.output
    assert isinstance(call.parsed_arguments, Weather)


def test_the_client_loops(tiny_endpoint: Endpoint) -> None:
    """A call is sent back with its output as the client holds it, and is answered."""
    choice: Any = {"type": "function", "name": "now"}
    with tiny_endpoint.client() as client:
        first = client.responses.create(**GREEDY, tool_choice=choice)
        (call,) = first.output
        assert call.type == "function_call"
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "noon"}
        answer = client.responses.create(**{**GREEDY, "input": [USER, call.to_dict(), result]})
    assert answer.usage is not None
    assert first.usage is not None
    assert answer.usage.input_tokens > first.usage.input_tokens


def test_the_prompt_is_that_of_chat(endpoint: Endpoint, http: httpx.Client) -> None:
    """Tools, calls and outputs give the token ids of the same conversation in chat."""
    engine = endpoint.serve()
    second = {**CALL, "call_id": "call_2", "name": "now", "arguments": "{}"}
    parts = [{"type": "input_text", "text": "noon"}, {"type": "input_text", "text": "UTC"}]
    items = [
        USER,
        {"role": "assistant", "content": "I look."},
        CALL,
        second,
        RESULT,
        {**RESULT, "call_id": "call_2", "output": parts},
    ]
    http.post(PATH, json={**ASKED, "input": items})
    calls = [("call_1", "get_weather", CALL["arguments"]), ("call_2", "now", "{}")]
    tool_calls = [
        {"id": each, "type": "function", "function": {"name": name, "arguments": arguments}}
        for each, name, arguments in calls
    ]
    chat = [
        USER,
        {"role": "assistant", "content": "I look.", "tool_calls": tool_calls},
        {"role": "tool", "tool_call_id": "call_1", "content": "sun"},
        {"role": "tool", "tool_call_id": "call_2", "content": "noon\nUTC"},
    ]
    tools = [
        {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}
        for tool in (WEATHER, NOW)
    ]
    response = http.post("/v1/chat/completions", json={"messages": chat, "tools": tools})
    assert response.status_code == 200, response.text
    (one, _), (other, _) = engine.requests
    assert one == other


@pytest.mark.parametrize(
    ("fields", "param", "word"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "web_search"),
        ({"tools": [{"type": "function"}]}, "tools.0.name", "required"),
        ({"tools": [WEATHER, WEATHER]}, "tools.1", "get_weather"),
        ({"tools": [{**NOW, "parameters": {"type": "array"}}]}, "tools.0.parameters", "object"),
        ({"tool_choice": {"type": "function", "name": "other"}}, "tool_choice", "other"),
        ({"tool_choice": {"type": "mcp", "server_label": "x"}}, "tool_choice", "`auto`"),
        ({"tool_choice": 1}, "tool_choice", "`auto`"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "`tools`"),
        ({"input": [USER, CALL]}, "input", "call_1"),
        ({"input": [USER, RESULT]}, "input.1.call_id", "call_1"),
        ({"input": [USER, CALL, CALL]}, "input.2.call_id", "one"),
        ({"input": [CALL, RESULT]}, "input", "user"),
        ({"input": [USER, CALLED]}, "input.1.arguments", "required"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(
    http: httpx.Client, fields: Any, param: str, word: str
) -> None:
    """A 400 says which tool, choice or item is wrong."""
    response = http.post(PATH, json={**ASKED, **fields})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert word in error["message"]
