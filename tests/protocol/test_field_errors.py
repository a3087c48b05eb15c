"""The errors of a body: the path of the field that must change, and JSON's words."""

from typing import Any

import pytest

from serve_app.errors import InvalidRequest
from serve_app.protocol.chat import ChatRequest
from serve_app.protocol.fields import Body
from serve_app.protocol.messages_api.request import MessagesRequest
from serve_app.protocol.responses_api.request import ResponsesRequest

HELLO = {"role": "user", "content": "Hello"}


def content(*blocks: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(blocks)}], "max_tokens": 8}


def schema(value: Any) -> dict[str, Any]:
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": value}}
    return {"messages": [HELLO], "response_format": form}


@pytest.mark.parametrize(
    ("request_type", "body", "param", "words"),
    [
        (MessagesRequest, content({"type": "text"}), "messages.0.content.0.text", "is required"),
        (
            MessagesRequest,
            content({"type": "text", "text": 5}),
            "messages.0.content.0.text",
            "a valid string",
        ),
        (MessagesRequest, content({"text": "a"}), "messages.0.content.0.type", "is required"),
        (MessagesRequest, content({"type": 5}), "messages.0.content.0.type", "'tool_use'"),
        (MessagesRequest, content("a"), "messages.0.content.0", "a JSON object"),
        (MessagesRequest, {"messages": [], "max_tokens": 8}, "messages", "not be empty"),
        (ResponsesRequest, {"input": [{"role": "user"}]}, "input.0.content", "is required"),
        (ResponsesRequest, {"input": ["a"]}, "input.0", "a JSON object"),
        (ResponsesRequest, {"input": ""}, "input", "not be empty"),
        (ChatRequest, schema([]), "response_format.json_schema.schema", "a JSON object"),
        (
            ChatRequest,
            {"messages": [HELLO], "structured_outputs": {"json": 5}},
            "structured_outputs.json",
            "a JSON object",
        ),
        (
            ChatRequest,
            {"messages": [HELLO], "structured_outputs": {"choice": []}},
            "structured_outputs.choice",
            "not be empty",
        ),
        (
            ChatRequest,
            {"messages": [HELLO], "response_format": "json"},
            "response_format",
            "a JSON object",
        ),
        (ChatRequest, {"messages": [HELLO], "logit_bias": []}, "logit_bias", "a JSON object"),
    ],
)
def test_an_error_names_the_field_as_the_client_wrote_it(
    request_type: type[Body], body: dict[str, Any], param: str, words: str
) -> None:
    """`param` is a path in the body, without the names of our own types, and the message says what
    the field should be."""
    with pytest.raises(InvalidRequest) as refused:
        request_type.read(body)
    assert refused.value.param == param
    assert words in refused.value.message


@pytest.mark.parametrize(
    ("request_type", "body", "field", "value"),
    [
        (ChatRequest, {"messages": [HELLO]}, "stream_options", {}),
        (ChatRequest, {"messages": [HELLO]}, "response_format", {"type": "text"}),
        (
            ChatRequest,
            {"messages": [HELLO]},
            "response_format",
            {"type": "json_schema", "json_schema": {"schema": {}, "name": None, "strict": None}},
        ),
        (ChatRequest, {"messages": [HELLO]}, "structured_outputs", {"regex": "a"}),
        (ResponsesRequest, {"input": "a"}, "text", {"format": {"type": "text", "name": None}}),
        (MessagesRequest, content({"type": "text", "text": "a"}), "output_config", {}),
        (MessagesRequest, content({"type": "text", "text": "a"}), "context_management", {}),
    ],
)
def test_null_inside_an_object_is_absent(
    request_type: type[Body], body: dict[str, Any], field: str, value: dict[str, Any]
) -> None:
    """Clients write every field of their own types, also those that are not known here."""
    plain = request_type.read({**body, field: value})
    with_nulls = {**value, "a_new_field": None}
    assert request_type.read({**body, field: with_nulls}).model_dump() == plain.model_dump()
    with pytest.raises(InvalidRequest) as refused:
        request_type.read({**body, field: {**value, "a_new_field": 1}})
    assert refused.value.param == f"{field}.a_new_field"
