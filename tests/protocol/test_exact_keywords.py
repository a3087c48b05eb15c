"""Keywords of JSON schemas that llguidance holds wrongly by itself."""

import json
from typing import Any

import jsonschema
import pytest
from jsonschema.validators import validator_for

from serve_app.errors import InvalidRequest
from serve_app.protocol.grammar_rules import json_rules
from serve_app.protocol.grammar_source import GrammarSource
from tests.protocol.test_grammar import compiled_grammar
from tests.protocol.test_json_schema_suite import accepts, grammar

UNQUOTED = {"type": "string", "pattern": '^[^"]*$'}
TUPLE = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "type": "array",
    "items": [UNQUOTED],
    "additionalItems": UNQUOTED,
}
PREFIX = {"prefixItems": [{"type": "null"}], "items": {"type": "boolean"}, "type": "array"}


def nested(schema: Any, depth: int) -> Any:
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def nested_value(value: Any, depth: int) -> Any:
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("schema", "invalid", "valid"),
    [
        (UNQUOTED, 'a"', "ab"),
        (nested(UNQUOTED, 100), nested_value('"', 100), nested_value("a", 100)),
        (TUPLE, ['"'], ["a"]),
        (TUPLE, ["a", '"'], ["a", "b"]),
        ({"type": "string", "pattern": r"^[^\\]*$"}, "a\\", "a\n"),
        ({"type": "string", "pattern": r"^[^]\\]*$"}, "a\\", "a"),
        ({"type": "string", "pattern": r"^[\x00-\x1f]$"}, '"', "\n"),
        ({"patternProperties": {'^[^"]*$': {}}, "additionalProperties": False}, {'"': 1}, {"a": 1}),
        ({"type": "number", "exclusiveMinimum": 1, "exclusiveMaximum": 1.5}, 1, 1.25),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, 0, 0.25),
        ({"type": "number", "minimum": -1.5, "exclusiveMaximum": -1}, -1, -1.25),
        ({"type": "number", "minimum": 0.5, "exclusiveMaximum": 1}, 1, 0.75),
        ({"type": "integer", "exclusiveMinimum": 2**53}, 2**53, 2**53 + 2),
        ({"type": "integer", "minimum": 2**53 + 1}, 2**53, 2**53 + 2),
        ({"type": "integer", "minimum": -(2**53) - 1}, -(2**53) - 2, -(2**53)),
        ({"type": "integer", "minimum": 0, "maximum": 2**63 - 1}, 2**63, 2**62),
        ({"type": "integer", "minimum": -(2**63), "maximum": 0}, 1, -5),
        ({**PREFIX, "additionalItems": {"type": "string"}}, [True], [None, True]),
        ({"$ref": "#/$defs/Größe <T>", "$defs": {"Größe <T>": {"const": 1}}}, 2, 1),
        ({"type": "object", "minProperties": 2, "required": ["a"]}, {"a": 1}, {"a": 1, "b": 2}),
    ],
)
def test_a_grammar_has_valid_values_alone(schema: Any, invalid: Any, valid: Any) -> None:
    """By jsonschema, one value is valid and the other is not; the grammar agrees."""
    validator = validator_for(schema, jsonschema.Draft202012Validator)(schema)
    assert (validator.is_valid(invalid), validator.is_valid(valid)) == (False, True)
    found = grammar(schema)
    assert not accepts(found.start(), invalid)
    assert accepts(found.start(), valid)


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        ({"const": 2**53 + 1}, "`const`"),
        ({"enum": [1, {"a": [-(2**53) - 1]}]}, "`enum`"),
        ({"const": 1e20, "type": "integer"}, "`const`"),
        ({"type": "integer", "minimum": 2**63}, "`minimum`"),
        ({"type": "object", "minProperties": 2}, "`minProperties`"),
        ({"$ref": "#/other", "other": {"type": "integer", "maximum": 2**53 + 1}}, "`maximum`"),
    ],
)
def test_a_number_that_cannot_be_held_is_refused(schema: Any, word: str) -> None:
    """The error names the keyword."""
    with pytest.raises(InvalidRequest, match=word):
        grammar(schema)


def test_a_schema_in_a_lark_grammar_has_the_same_rules() -> None:
    """A quote is not an answer of `%json` with this pattern, and a letter is."""
    schema = {"type": "string", "pattern": '^[^"]*$', "x-guidance": {"item_separator": ","}}
    lark = f"start: a\na: %json {json.dumps(schema)}"
    found = compiled_grammar(GrammarSource("lark", lark, "f"))
    assert not accepts(found.start(), '"')
    assert accepts(found.start(), "a")


def test_a_tool_that_is_not_strict_has_fewer_properties_at_least() -> None:
    """One tool's `minProperties` does not make the whole request fail."""
    schema = {"type": "object", "minProperties": 5, "required": ["a"]}
    assert json_rules(schema, lenient=True)["json_schema"]["minProperties"] == 2
    assert json.dumps(schema) in json.dumps(json_rules({"allOf": [schema]}))
