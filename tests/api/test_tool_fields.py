"""The fields of a request with tools: what is refused, by its name, and what counts as prompt."""

import asyncio
from typing import Any

import pytest

from serve_app.api.server import MixtralServer
from tests.api.tool_requests import (
    CHAT,
    NOW,
    QUESTION,
    WEATHER,
    ask,
    error,
    items,
)
from tests.tool_sets import Tools, function, tool_sets

UNIQUE = {"type": "object", "properties": {"l": {"type": "array", "uniqueItems": True}}}
PATTERNS = [{"pattern": f"^.*{c}.*$"} for c in "abcdefghijklmnop"]
EXPLODES = {
    "type": "object",
    "properties": {"a": {"type": "string", "allOf": PATTERNS}},
    "required": ["a"],
}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{}]}, "tools.0.type"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools.0.type"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools.0.function.name"),
        ({"tools": [function("no spaces")]}, "tools.0"),
        ({"tools": [function("")]}, "tools.0"),
        ({"tools": [NOW, NOW]}, "tools.1"),
        ({"tools": [NOW] * 129}, "tools"),
        ({"tools": [NOW, function("f", [])]}, "tools.1.function.parameters"),
        ({"tools": [function("f", {"type": "string"})]}, "tools.0.function.parameters"),
        ({"tools": [function("f", {"properties": 3})]}, "tools.0.function.parameters"),
        ({"tools": [NOW], "tool_choice": "one"}, "tool_choice"),
        ({"tools": [NOW], "tool_choice": {"name": "now"}}, "tool_choice"),
        ({"tools": [NOW], "tool_choice": WEATHER}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": WEATHER}, "tool_choice"),
        ({"tools": [NOW], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"tools": [NOW], "parallel_tool_calls": "yes"}, "parallel_tool_calls"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": {"name": "f"}}, "function_call"),
        (
            {"tools": [NOW, function("f", UNIQUE)], "tool_choice": "required"},
            "tools.1.function.parameters",
        ),
        ({"tools": [NOW, function("f", UNIQUE, strict=True)]}, "tools.1.function.parameters"),
        ({"tools": [NOW, function("f", EXPLODES)]}, "tools.1.function.parameters"),
    ],
)
def test_a_bad_field_is_named(tiny: MixtralServer, fields: dict[str, Any], param: str) -> None:
    """Each error is a sentence with the field that is wrong."""
    found = error(tiny, **fields)
    assert found["param"] == param
    assert found["message"].endswith(".")


def test_the_old_fields_name_the_new_ones(tiny: MixtralServer) -> None:
    """`functions` and `function_call` are answered with what to use instead."""
    assert "use `tools`" in error(tiny, functions=[{"name": "f"}])["message"]
    assert "use `tool_choice`" in error(tiny, function_call={"name": "f"})["message"]


def test_a_keyword_that_cannot_be_held_stops_no_free_answer(tiny: MixtralServer) -> None:
    """With `auto`, a schema with `uniqueItems` is held as far as possible, unless it is strict."""
    assert ask(tiny, tools=[NOW, function("f", UNIQUE)])["message"]["content"]


def test_no_tools_is_no_tools(tiny: MixtralServer) -> None:
    """Empty lists of tools, and modes that need no tools, are the same as no tools."""
    plain = ask(tiny)
    given: list[dict[str, Any]] = [
        {"tools": []},
        {"tools": None, "tool_choice": None},
        {"tools": [], "tool_choice": "none"},
        {"tool_choice": "auto", "parallel_tool_calls": False},
        {"functions": [], "function_call": "none"},
    ]
    for fields in given:
        assert ask(tiny, **fields) == plain


@pytest.mark.parametrize("path", ["/prompt", "/v1/completions"])
def test_other_routes_refuse_tools(tiny: MixtralServer, path: str) -> None:
    """The error says which route calls tools."""

    async def answer() -> Any:
        body = {"prompt": "Hi", "tools": [WEATHER]}
        return [item async for item in tiny.call("POST", path, body, "1")]

    (item,) = asyncio.run(answer())
    assert item["status"] == 400
    assert item["error"]["error"]["param"] == "tools"
    assert CHAT in item["error"]["error"]["message"]


def test_tokenize_counts_tools(tiny: MixtralServer) -> None:
    """`/tokenize` of a conversation with tools has the ids of its prompt; raw text has no tools."""

    async def post(path: str, **body: Any) -> Any:
        return [item async for item in tiny.call("POST", path, body, "1")][-1]

    prompt = {"messages": QUESTION, "tools": [WEATHER, NOW]}
    counted = asyncio.run(post("/tokenize", **prompt))["body"]
    answered = asyncio.run(post(CHAT, **prompt, max_tokens=1))["body"]
    assert len(counted["tokens"]) == counted["count"] == answered["usage"]["prompt_tokens"]
    assert "get_weather" in tiny.tokenizer.decode(counted["tokens"])
    refused = asyncio.run(post("/tokenize", prompt="Hi", tools=[NOW]))
    assert refused["error"]["error"]["param"] == "tools"


def test_many_tools_count_as_prompt(tiny: MixtralServer) -> None:
    """Descriptions that are longer than a prompt may be are refused."""
    found = error(tiny, tools=[function("f", description="x" * 100_001)])
    assert found["param"] == "messages"


@pytest.mark.timeout(600)  # some 75,000 tokens of prompts
def test_sets_are_read(tiny: MixtralServer) -> None:
    """Every set of tools passes with `auto` too."""

    async def answers() -> Any:
        sets: list[Tools] = tool_sets()
        return await asyncio.gather(*(items(tiny, tools=tools, max_tokens=2) for tools in sets))

    for (item,) in asyncio.run(answers()):
        assert item["status"] == 200, item
