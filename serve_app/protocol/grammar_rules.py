"""Converts grammars to llguidance's form."""

import json
from typing import Any

from serve_app.protocol.call import JsonObject
from serve_app.protocol.grammar_source import GrammarSource
from serve_app.protocol.one_of import as_any_of

JSON_OPTIONS = {
    # Without a limit a model may write spaces until its answer is cut.
    "whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,40}",
}


def rules(source: GrammarSource) -> dict[str, Any]:
    """Returns the grammar, without a name, of a source of another kind than `tools`."""
    if source.kind == "json":
        return json_rules(json.loads(source.text))
    if source.kind == "regex":
        from llguidance import LLMatcher

        found: dict[str, Any] = json.loads(LLMatcher.grammar_from_regex(source.text))
        return {"lark_grammar": found["grammars"][0]["lark_grammar"]}
    if source.kind == "choice":
        choices = " | ".join(json.dumps(each) for each in json.loads(source.text))
        return {"lark_grammar": f"start: {choices}"}
    return {"lark_grammar": source.text}


def json_rules(schema: dict[str, Any] | bool, *, lenient: bool = False) -> dict[str, Any]:
    """Returns the grammar of a JSON schema.

    An unsupported keyword is an error, or ignored with `lenient`.
    """
    # `true` and `false` are schemas, too: any value, and none.
    schema = {"allOf": [schema]} if isinstance(schema, bool) else schema
    options: JsonObject = dict(JSON_OPTIONS)
    if lenient:
        options |= {"lenient": True, "coerce_one_of": True}
    return {"json_schema": {**as_any_of(schema), "x-guidance": options}}
