"""`\\ud800` is valid in JSON and no character: UTF-8, prompts and responses cannot contain it."""

import json
from typing import Any

import httpx
import pytest

BAD = "a\ud800"
HELLO = {"role": "user", "content": "Hello"}
RESULT = {"role": "tool", "tool_call_id": "c", "content": "3"}
CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
SCHEMAS: list[Any] = [
    {"type": "object", "description": BAD},
    {"type": "object", "properties": {BAD: {}}},
    {"type": "object", "properties": {"a": {"enum": [[BAD]]}}},
]


def tools(**fields: Any) -> dict[str, Any]:
    function = {"type": "function", "function": {"name": "f", **fields}}
    return {"messages": [HELLO], "tools": [function]}


def called(result: dict[str, Any] = RESULT, **fields: Any) -> dict[str, Any]:
    """Returns a conversation with one call and its result."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}", **fields}}
    return {"messages": [HELLO, {"role": "assistant", "tool_calls": [call]}, result]}


def outputs(**fields: Any) -> dict[str, Any]:
    return {"messages": [HELLO], "structured_outputs": fields}


def used(value: Any) -> dict[str, Any]:
    """Returns a request of Anthropic's API with one call."""
    use = {"type": "tool_use", "id": "t", "name": "f", "input": value}
    result = {"type": "tool_result", "tool_use_id": "t", "content": "3"}
    turns = [{"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
    return {"messages": [HELLO, *turns], "max_tokens": 8}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, tools(description=BAD), "tools.0.function.description"),
        *((CHAT, tools(parameters=it), "tools.0.function.parameters") for it in SCHEMAS),
        (CHAT, called(name=BAD), "messages.1.tool_calls.0"),
        (CHAT, called(arguments=BAD), "messages.1.tool_calls.0"),
        (CHAT, called(arguments={BAD: 1}), "messages.1.tool_calls.0"),
        (CHAT, outputs(regex=BAD), "structured_outputs.regex"),
        (CHAT, outputs(choice=[BAD]), "structured_outputs.choice"),
        (CHAT, outputs(json=SCHEMAS[1]), "structured_outputs.json"),
        (CHAT, outputs(json=json.dumps(SCHEMAS[0])), "structured_outputs.json"),
        (
            CHAT,
            {**tools(), "tool_choice": {"type": "function", "function": {"name": BAD}}},
            "tool_choice",
        ),
        (
            RESPONSES,
            {
                "input": "Hello",
                "tools": [{"type": "function", "name": "f", "parameters": SCHEMAS[0]}],
            },
            "tools.0.parameters",
        ),
        (RESPONSES, {"input": "Hello", "metadata": {BAD: "a"}}, "metadata"),
        (MESSAGES, used({"a": [BAD]}), "messages.1.content.0.input"),
        (
            MESSAGES,
            {**used({}), "tools": [{"name": "f", "input_schema": SCHEMAS[2]}]},
            "tools.0.input_schema",
        ),
        ("/tokenize", tools(description=BAD), "tools.0.function.description"),
    ],
)
def test_a_lone_surrogate_is_refused(
    http: httpx.Client, path: str, body: dict[str, Any], param: str
) -> None:
    """In tools, calls, grammars and metadata it is a 400 that names the field, in our own form."""
    response = http.post(path, content=json.dumps(body))
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith(param)


@pytest.mark.parametrize("result", ['{"a": "\\ud83d"}', '["\\udc00"]'])
def test_a_result_with_the_escape_of_one_is_text(http: httpx.Client, result: str) -> None:
    """A tool may cut its JSON between the two escapes of an emoji; the prompt has the escape."""
    answer = http.post(CHAT, json=called({**RESULT, "content": result}))
    assert answer.status_code == 200
    ids = http.post("/tokenize", json=called({**RESULT, "content": result})).json()["tokens"]
    prompt = http.post("/detokenize", json={"tokens": ids}).json()["prompt"]
    assert json.dumps(result) in prompt
