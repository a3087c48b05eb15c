"""`oneOf` becomes `anyOf` where no value matches two of its schemas."""

from typing import Annotated, Any, Literal

import jsonschema
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.protocol.one_of import as_any_of

SCALARS = st.sampled_from([None, True, False, 0, 1, 1.0, 2.5, "a", "b"])
NAMES = st.sampled_from(["a", "b"])
LISTED = st.fixed_dictionaries(
    {}, optional={"const": SCALARS, "enum": st.lists(SCALARS, min_size=1, max_size=3)}
)
SCHEMAS = st.one_of(
    st.booleans(),
    LISTED,
    st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(["object", "integer", "number", "string", ["object", "null"]]),
            "properties": st.dictionaries(NAMES, LISTED, max_size=2),
            "required": st.lists(NAMES, unique=True),
            "additionalProperties": st.booleans(),
            "patternProperties": st.just({"a": {}}),
        },
    ),
)
BRANCHES = SCHEMAS | st.sampled_from([{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b/c"}])
VALUES = SCALARS | st.dictionaries(NAMES, SCALARS)


@given(branches=st.lists(BRANCHES, min_size=1, max_size=3), named=SCHEMAS, value=VALUES)
def test_only_where_the_schemas_exclude_each_other(
    branches: list[Any], named: Any, value: Any
) -> None:
    """By jsonschema, a value matches the new schema if and only if it matches the old one."""
    schema = {"oneOf": branches, "$defs": {"a": named, "b": {"c": {"type": "null"}}}}
    new = as_any_of(schema)
    for each in (schema, new):
        jsonschema.Draft202012Validator.check_schema(each)
    old_one, new_one = (jsonschema.Draft202012Validator(each) for each in (schema, new))
    assert new_one.is_valid(value) == old_one.is_valid(value)


A = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
B = {"type": "object", "properties": {"b": {}}, "required": ["b"]}
CLOSED = {"additionalProperties": False}


class Cat(pydantic.BaseModel):
    kind: Literal["cat"]


class Dog(pydantic.BaseModel):
    kind: Literal["dog", "puppy"]


class Owner(pydantic.BaseModel):
    pets: list[Annotated[Cat | Dog, pydantic.Field(discriminator="kind")]]


@pytest.mark.parametrize(
    "schema",
    [
        {"oneOf": [{"type": "null"}, {"$ref": "#/$defs/A"}], "$defs": {"A": A}},
        {"oneOf": [{"const": 1}, {"const": 2}, {"enum": ["a", None]}]},
        {"oneOf": [{**A, **CLOSED}, {**B, **CLOSED}]},
        {"items": {"properties": {"x": {"oneOf": [A, {"type": ["string", "array"]}]}}}},
        Owner.model_json_schema(),
    ],
)
def test_what_excludes_each_other(schema: dict[str, Any]) -> None:
    """Types, listed values, a property that one requires and the other forbids, a discriminator;
    also behind references and inside other schemas."""
    assert "oneOf" in str(schema)
    assert "oneOf" not in str(as_any_of(schema))


@pytest.mark.parametrize(
    "schema",
    [
        {"oneOf": [{"const": 1}, {"const": 1.0}]},
        {"oneOf": [{"type": "integer"}, {"type": "number"}]},
        {"oneOf": [{"type": 5}, {"type": "null"}]},
        {"oneOf": [A, B]},
        {"oneOf": [{"$ref": "#/$defs/A"}, {"type": "null"}], "$defs": {"A": {"$ref": "#/$defs/A"}}},
        {"const": {"oneOf": [{"const": 1}, {"const": 2}]}},
        {"properties": {"oneOf": {"type": "string"}}},
        {"oneOf": [{"type": "null"}, {"$ref": "#/x"}], "x": {"$id": "y", "type": "object"}},
    ],
)
def test_what_stays(schema: dict[str, Any]) -> None:
    """A schema without certainty, an invalid one, and one in which the word is data, is as it
    was."""
    assert as_any_of(schema) == schema
