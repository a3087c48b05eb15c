"""Replaces `oneOf` in JSON schemas with `anyOf` if its branches exclude each other.

A value must match exactly one schema of a `oneOf`. A grammar cannot count matches, so llguidance
accepts the keyword only if it can prove that no value matches two branches, without resolving
`$ref`. This module resolves `$ref` too. See
https://json-schema.org/draft/2020-12/json-schema-core, 10.2.1.3.

Example: `{"oneOf": [{"type": "string"}, {"type": "integer"}]}` means the same with `anyOf`, because
no value is both.
"""

import json
from collections.abc import Iterator
from itertools import combinations
from typing import Any

from serve_app.protocol.schema_tree import MAX_DEPTH, mapped

MAX_BRANCHES = 200
"""Maximum number of branches of a `oneOf`, because each pair is compared."""
MAX_COMPARED_CHARS = 5_000_000
"""Maximum number of branches times their length as JSON; comparing these takes half a second."""
TYPES = {str: "string", bool: "boolean", type(None): "null"}
ALL_TYPES = {*TYPES.values(), "number", "integer", "object", "array"}


def as_any_of(schema: dict[str, Any]) -> dict[str, Any]:
    """Returns `schema` with `anyOf` instead of each `oneOf` whose schemas exclude each other."""
    if json.dumps(schema).count('"$id"') > ("$id" in schema):
        return schema  # a reference may be relative to an inner `$id`
    new: dict[str, Any] = mapped(schema, lambda inner: _exclusive(inner, schema))
    return new


def _exclusive(schema: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    branches = schema.get("oneOf")
    if isinstance(branches, list) and "anyOf" not in schema and _is_comparable(branches):
        resolved = [_resolved(branch, root) for branch in branches]
        if all(_exclude(*pair) for pair in combinations(resolved, 2)):
            schema["anyOf"] = schema.pop("oneOf")
    return schema


def _is_comparable(branches: list[Any]) -> bool:
    count = len(branches)
    return count <= MAX_BRANCHES and count * len(json.dumps(branches)) <= MAX_COMPARED_CHARS


def _resolved(schema: Any, root: dict[str, Any]) -> dict[str, Any]:
    """Returns the schema that a `$ref` refers to inside `root`; the schema of any value if
    unknown."""
    for _ in range(MAX_DEPTH):
        if not isinstance(schema, dict):
            return {}
        if "$ref" not in schema:
            return schema
        target: Any = root
        first, *names = str(schema["$ref"]).split("/")
        for name in names:
            name = name.replace("~1", "/").replace("~0", "~")
            target = target.get(name) if isinstance(target, dict) else None
        schema = target if first == "#" else None
    return {}


def _exclude(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Returns whether no value can match both schemas. False if it is not certain."""
    if not _types(first) & _types(second):
        return True
    values = _values(first), _values(second)
    if None not in values:
        return not set(values[0] or ()) & set(values[1] or ())
    if _types(first) != {"object"} or _types(second) != {"object"}:
        return False
    return any(_is_closed_to(first, name) for name in _required(second)) or any(
        _is_closed_to(second, name) or _differ(first, second, name) for name in _required(first)
    )


def _types(schema: dict[str, Any]) -> set[str]:
    """Returns the types of matching values, where `number` contains `integer`."""
    declared = schema.get("type")
    listed = (
        declared if isinstance(declared, list) else [declared] if isinstance(declared, str) else []
    )
    names = set(map(str, listed))
    if not names and (values := _values(schema)) is not None:
        names = {TYPES.get(type(json.loads(value)), "number") for value in values}
    return (names | {"integer"} if "number" in names else names) or ALL_TYPES


def _values(schema: dict[str, Any]) -> list[str] | None:
    """Returns the matching values as JSON, where the schema lists them and all are scalars."""
    listed = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(listed, list) or any(isinstance(value, dict | list) for value in listed):
        return None
    # In JSON schema 1 and 1.0 are one value.
    is_int = [isinstance(value, float) and value.is_integer() for value in listed]
    return [
        json.dumps(int(value) if whole else value)
        for value, whole in zip(listed, is_int, strict=True)
    ]


def _required(schema: dict[str, Any]) -> Iterator[str]:
    names = schema.get("required")
    yield from (name for name in names if isinstance(name, str)) if isinstance(names, list) else ()


def _properties(schema: dict[str, Any]) -> dict[str, Any]:
    properties = schema.get("properties")
    return properties if isinstance(properties, dict) else {}


def _is_closed_to(schema: dict[str, Any], name: str) -> bool:
    """Returns whether no object that matches `schema` has the property `name`."""
    is_closed = schema.get("additionalProperties") is False and "patternProperties" not in schema
    return is_closed and name not in _properties(schema)


def _differ(first: dict[str, Any], second: dict[str, Any], name: str) -> bool:
    """Returns whether the property `name`, which both require, has lists of values without a common
    one."""
    if name not in _required(second):
        return False
    pair = [_properties(schema).get(name) for schema in (first, second)]
    values = [_values(schema) if isinstance(schema, dict) else None for schema in pair]
    return None not in values and not set(values[0] or ()) & set(values[1] or ())
