"""The grammar of an answer that may call tools.

A call has the form that the prompt shows: `[TOOL_CALLS] [{"name": "f", "arguments": {...}}]`.
Everything after the marker must match the tools' schemas; the text before it is free. If a call is
optional, schema keywords that llguidance does not support are ignored, except for strict tools:
`uniqueItems` in one tool should not make the whole request fail.
"""

import json
import re
from typing import Any

from serve_app.errors import InvalidRequest
from serve_app.protocol.grammar_rules import json_rules, rules
from serve_app.protocol.grammar_source import MAX_CHARS, GrammarSource
from serve_app.protocol.tool_calls import MARKER
from serve_app.protocol.tools import Tools

MAX_CALLS = 32
"""Maximum number of calls in one answer. Without a limit a model may repeat itself until
`max_tokens`."""
_COMBINED = {
    "$ref",
    "additionalProperties",
    "allOf",
    "anyOf",
    "dependentSchemas",
    "if",
    "not",
    "oneOf",
    "patternProperties",
    "unevaluatedProperties",
}
"""Keywords with which an object may have more than its `properties`."""


def source(tools: Tools, answer: GrammarSource | None) -> GrammarSource:
    """Returns the grammar for `tools`.

    `answer` is the grammar of an answer without a call; None if it is free. Raises `InvalidRequest`
    if the schemas are too long.
    """
    mode = tools.choice.mode
    called = tools.callable
    if not called and answer is not None:
        return answer
    content = {
        "calls": [
            {
                "name": tool.name,
                "schema": _closed(tool.parameters),
                "field": tool.field,
                "is_lenient": mode == "auto" and not tool.is_strict,
            }
            for tool in called
        ],
        "is_required": mode == "required",
        "is_single": tools.choice.is_single,
        "answer": answer,
    }
    text = json.dumps(content)
    if len(text) > MAX_CHARS:
        raise InvalidRequest(
            f"The tools have {len(text)} characters; {MAX_CHARS} are allowed.", param="tools"
        )
    return GrammarSource("tools", text, "tools")


def grammars(source: GrammarSource, space: str, marker_id: int | None) -> list[dict[str, Any]]:
    """Returns `GrammarSource`s of this module as llguidance's grammars. The first one is the start.

    `space` is the beginning of the model's texts, or empty. `marker_id` is the token that begins
    calls; None if that is the text `MARKER`.
    """
    content = json.loads(source.text)
    calls, answer = content["calls"], content["answer"]
    found = [{"lark_grammar": _lark(content, _literal(space), marker_id)}]
    if answer is not None:
        found.append({"name": "answer", **rules(GrammarSource(*answer))})
    for index, call in enumerate(calls):
        found.append({"name": f"args_{index}", **_arguments(call)})
    return found


def schemas(source: GrammarSource) -> list[tuple[str, dict[str, Any]]]:
    """Returns the field and the grammar of each tool's schema."""
    return [(call["field"], _arguments(call)) for call in json.loads(source.text)["calls"]]


def _arguments(call: dict[str, Any]) -> dict[str, Any]:
    return json_rules(call["schema"], lenient=call["is_lenient"])


def _lark(content: dict[str, Any], space: str, marker_id: int | None) -> str:
    """Returns the rules of an answer."""
    if marker_id is None:
        marker = f"{space} {_literal(MARKER + ' ')}"
        text_and_marker = "marked"
    else:
        marker = f"<[{marker_id}]> {space}"
        text_and_marker = f"TEXT? {marker}"
    if not content["calls"]:
        starts = ["TEXT"]
    elif content["is_required"]:
        starts = [f"{marker} calls"]
    elif content["answer"] is not None:
        starts = [f"{space} @answer", f"{marker} calls"]
    else:
        starts = ["TEXT", f"{text_and_marker} calls"]
    more = "" if content["is_single"] else f' (", " call){{0,{MAX_CALLS - 1}}}'
    heads = [_literal(f'{{"name": "{call["name"]}", "arguments": ') for call in content["calls"]]
    call = " | ".join(f'{head} @args_{index} "}}"' for index, head in enumerate(heads))
    lines = [f"start: {' | '.join(starts)}"]
    if heads:
        lines += [f'calls: "[" call{more} "]"', f"call: {call}"]
    pattern = re.escape(MARKER)
    lines.append(f"TEXT: /(?s:.*)/ & ~/(?s:.*){pattern}(?s:.*)/")
    lines.append(f"marked[lazy]: /(?s:.*){pattern} /")
    return "\n".join(lines)


def _literal(text: str) -> str:
    return json.dumps(text) if text else ""


def _closed(parameters: dict[str, Any]) -> dict[str, Any]:
    """Returns the schema of an object with the properties of `parameters` and no others.

    Functions refuse arguments that they do not declare, but few schemas say so. A schema that
    allows other properties explicitly does not change.
    """
    if not parameters:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    schema = {"type": "object", **parameters}
    properties = schema.get("properties")
    if not isinstance(properties, dict) or not _COMBINED.isdisjoint(schema):
        return schema
    if not set(_names(schema.get("required"))) <= properties.keys():
        return schema
    return {**schema, "additionalProperties": False}


def _names(required: Any) -> list[str]:
    names = required if isinstance(required, list) else []
    return [name for name in names if isinstance(name, str)]
