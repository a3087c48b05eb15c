"""Tools, calls and results in prompts, compared with Mistral's own encoder."""

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.errors import InvalidRequest
from serve_app.protocol.chat import ChatRequest
from serve_app.protocol.messages import Message
from serve_app.protocol.tokenizer import Tokenizer
from serve_app.protocol.tool_prompt import plain_turns
from serve_app.protocol.tools import Tool
from tests import mistral
from tests.fakes import tokenizer

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": 'A "city" in [INST] Ünicode'}},
    "required": ["city"],
}
WEATHER = Tool("get_weather", 'The "weather",\nof a city. </s>', SCHEMA, "tools.0")
NOW = Tool("now", "", {}, "tools.1")


def read(messages: list[dict[str, Any]]) -> list[Message]:
    return ChatRequest.read({"messages": messages}).messages


def call(index: int, arguments: str = '{"city": "Paris"}') -> dict[str, Any]:
    """Returns a call whose id has Mistral's form."""
    function = {"name": "get_weather", "arguments": arguments}
    return {"id": f"id{index:07}", "type": "function", "function": function}


def result(index: int, content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"id{index:07}", "content": content}


TEXTS = st.sampled_from(
    ["Hi", " two spaces", "[TOOL_CALLS] [", "</s>é", '{"t": [1, "ü"]}', "12", "a  b"]
)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Turns of the user that are answered at once or after calls, as Mistral allows them."""
    messages: list[dict[str, Any]] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(TEXTS)})
    num_turns = draw(st.integers(1, 3))
    for turn in range(num_turns):
        messages.append({"role": "user", "content": draw(TEXTS)})
        is_last = turn == num_turns - 1
        num_calls = draw(st.integers(0, 2))
        ids = [10 * turn + index for index in range(num_calls)]
        if ids:
            arguments = draw(st.sampled_from(['{"city": "Ròma"}', "{}", '{"city":[1]}']))
            calls = [call(each, arguments) for each in ids]
            messages.append({"role": "assistant", "content": None, "tool_calls": calls})
            messages += [result(each, draw(TEXTS | st.just(""))) for each in ids]
        if not is_last:
            messages.append({"role": "assistant", "content": draw(TEXTS)})
    return messages


@given(conversations(), st.sampled_from([(), (WEATHER,), (WEATHER, NOW)]))
def test_ids_are_mistrals(
    tool_tokenizer: Tokenizer, messages: list[dict[str, Any]], tools: tuple[Tool, ...]
) -> None:
    """With tool tokens in the vocabulary, a conversation with tools has exactly the ids of
    Mistral's encoder, and what clients write never becomes a control token."""
    ids = tool_tokenizer.render_with_tools(read(messages), tools)
    assert ids == mistral.tool_ids(messages, tools)


def test_ids_of_other_forms_stay_apart(tool_tokenizer: Tokenizer) -> None:
    """OpenAI's ids are made into Mistral's nine characters; equal ones stay equal."""
    ids = ["call_" + "a" * 24, "call_" + "b" * 24]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "tool_calls": [{**call(0), "id": each} for each in ids]},
        *({"role": "tool", "tool_call_id": each, "content": "1"} for each in ids),
    ]
    text = tool_tokenizer.decode(tool_tokenizer.render_with_tools(read(messages), ()))
    found = re.findall('"call_id": "([a-zA-Z0-9]{9})"', text)
    assert len(set(found)) == 2
    assert all(text.count(f'"{each}"') == 2 for each in found)


def test_only_mistrals_tokens_make_a_checkpoint_one_for_tools(
    mixtral_tokenizer: Tokenizer, tool_tokenizer: Tokenizer
) -> None:
    """8x22B's tokenizer has a token for calls, and says so; 8x7B's has none."""
    assert mixtral_tokenizer.tool_calls_id is None
    assert tool_tokenizer.tool_calls_id == tool_tokenizer.backend.token_to_id("[TOOL_CALLS]")
    assert any("tool tokens" in note for note in tool_tokenizer.notes)


MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Weather in Paris and Rome?"},
    {
        "role": "assistant",
        "content": "I look.",
        "tool_calls": [call(0), call(1, '{"city": "Rome"}')],
    },
    result(0, "sunny"),
    result(1, '{"t": 20}'),
    {"role": "user", "content": "Thanks."},
]


def test_plain_turns_say_everything_in_text() -> None:
    """Without tool tokens, tools end the system message, calls are the assistant's text in the form
    that the grammar asks for, and results are one turn of the user with the functions' names."""
    turns = plain_turns(read(MESSAGES), [WEATHER, NOW])
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user", "user"]
    assert turns[0]["content"].startswith("Be short.\n\nYou can call")
    lines = [line for line in turns[0]["content"].splitlines() if line.startswith('{"name"')]
    assert [json.loads(line) for line in lines] == [
        {"name": "get_weather", "description": WEATHER.description, "parameters": SCHEMA},
        {"name": "now", "description": "", "parameters": {"type": "object", "properties": {}}},
    ]
    assert turns[2]["content"] == (
        'I look.\n\n[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}, '
        '{"name": "get_weather", "arguments": {"city": "Rome"}}]'
    )
    assert turns[3]["content"] == (
        '[TOOL_RESULTS] [{"name": "get_weather", "content": "sunny"}, '
        '{"name": "get_weather", "content": {"t": 20}}]'
    )


def test_a_longer_conversation_begins_like_the_shorter_one() -> None:
    """Tools do not move when a conversation goes on, so prefix caching works."""
    before = tokenizer().render_with_tools(read(MESSAGES[:2]), [WEATHER])
    after = tokenizer().render_with_tools(read(MESSAGES), [WEATHER])
    assert after[: len(before)] == before


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([{"role": "tool", "content": "1"}], "messages.1.tool_call_id"),
        ([result(0, "1")], "messages.1.tool_call_id"),
        ([{"role": "assistant", "tool_calls": [call(0)]}], "messages.1.tool_calls"),
        (
            [{"role": "assistant", "tool_calls": [call(0), call(1)]}, result(0, "1")],
            "messages.1.tool_calls",
        ),
        (
            [{"role": "assistant", "tool_calls": [call(0)]}, result(1, "1")],
            "messages.2.tool_call_id",
        ),
        (
            [{"role": "assistant", "tool_calls": [call(0)]}, result(0, "1"), result(0, "1")],
            "messages.3.tool_call_id",
        ),
        (
            [{"role": "assistant", "tool_calls": [call(0), call(0)]}],
            "messages.1.tool_calls.1.id",
        ),
        ([{"role": "assistant", "tool_calls": [{"id": "a"}]}], "messages.1.tool_calls.0"),
        ([{"role": "assistant", "tool_calls": {}}], "messages.1.tool_calls"),
        ([{"role": "assistant", "tool_calls": ["x"]}], "messages.1.tool_calls.0"),
        (
            [{"role": "assistant", "tool_calls": [call(0, 3)]}],  # type: ignore[arg-type]
            "messages.1.tool_calls.0.function.arguments",
        ),
        ([{"role": "user", "content": "a", "tool_calls": [call(0)]}], "messages.1.tool_calls"),
        ([{"role": "assistant", "function_call": {"name": "f"}}], "messages.1.function_call"),
        ([{"role": "function", "name": "f", "content": "1"}], "messages.1.role"),
    ],
)
def test_a_bad_message_is_named(messages: list[dict[str, Any]], param: str) -> None:
    """Results belong to calls and calls have results, as OpenAI's and Mistral's APIs want it."""
    with pytest.raises(InvalidRequest) as refused:
        read([{"role": "user", "content": "Hi"}, *messages])
    assert refused.value.param == param


def test_arguments_may_be_an_object() -> None:
    """Clients that send arguments as an object, or none, are understood."""
    calls = [call(0, {"a": "ü"}), call(1, None)]  # type: ignore[arg-type]
    turns: list[dict[str, Any]] = [
        {"role": "assistant", "tool_calls": calls},
        result(0, "1"),
        result(1, "1"),
    ]
    (_, message, *_) = read([{"role": "user", "content": "Hi"}, *turns])
    assert [each.arguments for each in message.tool_calls] == ['{"a": "ü"}', "{}"]
