"""Converts grammars to llguidance's form."""

import json
import re
from typing import Any

from serve_app.errors import InvalidRequest
from serve_app.protocol.call import JsonObject
from serve_app.protocol.exact_keywords import with_exact
from serve_app.protocol.grammar_source import GrammarSource
from serve_app.protocol.neutral_keywords import without_neutral
from serve_app.protocol.one_of import as_any_of

JSON_OPTIONS = {
    # Without a limit a model may write spaces until its answer is cut.
    "whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,40}",
}
MAX_GBNF_CHARS = 10_000
"""The conversion's time grows with the square of the number of rules: half a second for these."""
_JSON = re.compile(r"%json\s*")
"""The beginning of a JSON schema in a Lark grammar."""
_GBNF_RULE = re.compile(r"^\s*[\w-]+\s*::=", re.MULTILINE)


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
        # A terminal is one regular expression; with a rule for each choice, thousands are too many.
        return {"lark_grammar": f"start: CHOICE\nCHOICE: {choices}"}
    return {"lark_grammar": _as_lark(source)}


def _as_lark(source: GrammarSource) -> str:
    """Returns a grammar in Lark's notation. The other notation that vLLM takes is GBNF, as in
    `root ::= "yes" | "no"`. Raises `InvalidRequest`."""
    if not _GBNF_RULE.search(source.text):
        return _with_json_rules(source.text)
    if len(source.text) > MAX_GBNF_CHARS:
        raise InvalidRequest(
            f"`{source.field}` has {len(source.text)} characters; {MAX_GBNF_CHARS} are allowed in "
            "GBNF, and more in Lark's notation.",
            param=source.field,
        )
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return gbnf_to_lark(source.text)
    except Exception as error:  # the library raises plain `Exception`s too
        reason = " ".join(str(error).split()).rstrip(".")
        raise InvalidRequest(
            f"`{source.field}` cannot be used: {reason}.", param=source.field
        ) from None


def _with_json_rules(lark: str) -> str:
    """Returns a Lark grammar with the rules of `json_rules` for each JSON schema in it."""
    text, end = "", 0
    for match in _JSON.finditer(lark):
        if match.start() < end:
            continue  # inside a schema
        try:
            schema, schema_end = json.JSONDecoder().raw_decode(lark, match.end())
        except (ValueError, RecursionError):
            continue  # llguidance refuses it
        if isinstance(schema, dict):
            new = json_rules(schema)["json_schema"]
            if isinstance(options := schema.get("x-guidance"), dict):
                new["x-guidance"] |= options
            text += lark[end : match.end()] + json.dumps(new)
            end = schema_end
    return text + lark[end:]


def json_rules(schema: dict[str, Any] | bool, *, lenient: bool = False) -> dict[str, Any]:
    """Returns the grammar of a JSON schema.

    An unsupported keyword is an error, or ignored with `lenient`.
    """
    # `true` and `false` are schemas, too: any value, and none.
    schema = {"allOf": [schema]} if isinstance(schema, bool) else schema
    options: JsonObject = dict(JSON_OPTIONS)
    if lenient:
        options |= {"lenient": True, "coerce_one_of": True}
    new = with_exact(as_any_of(without_neutral(schema)), lenient=lenient)
    return {"json_schema": {**new, "x-guidance": options}}
