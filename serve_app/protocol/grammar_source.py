"""The request fields that set a grammar for the answer: OpenAI's and vLLM's.

Protocols: https://platform.openai.com/docs/guides/structured-outputs and
https://docs.vllm.ai/en/latest/features/structured_outputs.html.
"""

import json
from typing import Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from serve_app.errors import InvalidRequest
from serve_app.protocol.field_errors import no_unicode
from serve_app.protocol.field_types import InnerObject, Text, is_unicode

MAX_CHARS = 100_000
"""Maximum number of characters in a grammar; a schema is counted as JSON."""

Kind = Literal["json", "regex", "choice", "lark", "tools"]


class GrammarSource(NamedTuple):
    """A grammar from a client. Equal sources mean the same grammar."""

    kind: Kind
    text: str
    """The schema or the list of choices as JSON, the regular expression, the Lark grammar, or the
    output of `tool_grammar`."""
    field: str
    """The request field of the grammar, for errors."""


class JsonSchema(InnerObject):
    """`response_format.json_schema`. Every schema is enforced exactly, even without `strict`."""

    name: Text = ""
    description: Text | None = None
    schema_: dict[str, Any] | bool = Field(default=True, alias="schema")
    strict: bool | None = None


class ResponseFormat(InnerObject):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @property
    def source(self) -> GrammarSource:
        """The grammar of a type other than `text`. Raises `InvalidRequest`."""
        if self.type == "json_object":
            return schema_source({"type": "object"}, "response_format")
        if self.json_schema is None:
            raise InvalidRequest(
                "`response_format.json_schema` is required with the type `json_schema`.",
                param="response_format.json_schema",
            )
        return schema_source(self.json_schema.schema_, "response_format.json_schema.schema")


class StructuredOutputs(InnerObject):
    """vLLM's `structured_outputs`: one of these grammars."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    """A JSON schema, as an object or as text."""
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = Field(default=None, min_length=1)
    grammar: str | None = None
    """A grammar in Lark's notation, with the start rule `start`, or in GBNF, with `root`."""

    @model_validator(mode="after")
    def _is_one_grammar(self) -> Self:
        given = (self.json_, self.json_object or None, self.regex, self.choice, self.grammar)
        if sum(each is not None for each in given) != 1:
            raise InvalidRequest(
                "`structured_outputs` takes one of `json`, `json_object`, `regex`, `choice` and "
                "`grammar`.",
                param="structured_outputs",
            )
        return self

    @property
    def source(self) -> GrammarSource:
        """The grammar. Raises `InvalidRequest`."""
        if self.regex is not None:
            return _checked("regex", self.regex, "structured_outputs.regex")
        if self.choice is not None:
            return _checked(
                "choice", json.dumps(self.choice, ensure_ascii=False), "structured_outputs.choice"
            )
        if self.grammar is not None:
            return _checked("lark", self.grammar, "structured_outputs.grammar")
        if self.json_ is None:
            return schema_source({"type": "object"}, "structured_outputs.json_object")
        return schema_source(self.json_, "structured_outputs.json")


def schema_source(schema: dict[str, Any] | bool | str, field: str) -> GrammarSource:
    """Returns the grammar source of a JSON schema from the request field `field`. Raises
    `InvalidRequest`."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError):
            raise InvalidRequest(f"`{field}` is not valid JSON.", param=field) from None
    if not isinstance(schema, dict | bool):
        raise InvalidRequest(f"`{field}` should be a JSON schema.", param=field)
    return _checked("json", json.dumps(schema, ensure_ascii=False), field)


def _checked(kind: Kind, text: str, field: str) -> GrammarSource:
    if not is_unicode(text):
        raise no_unicode(field)
    if len(text) > MAX_CHARS:
        raise InvalidRequest(
            f"`{field}` has {len(text)} characters; {MAX_CHARS} are allowed.", param=field
        )
    return GrammarSource(kind, text, field)
