"""Applies a function to a JSON schema and to every schema inside it."""

from collections.abc import Callable
from typing import Any

MAX_DEPTH = 128
"""Maximum depth of nested schemas; llguidance refuses JSON with more levels."""
ONE = ("additionalItems", "additionalProperties", "items")
LISTS = ("allOf", "anyOf", "items", "oneOf", "prefixItems")
NAMED = ("properties", "patternProperties", "$defs", "definitions")
"""Keywords whose value is a schema, a list of schemas, and an object of schemas by name."""


def mapped(
    schema: Any, change: Callable[[dict[str, Any]], dict[str, Any]], depth: int = MAX_DEPTH
) -> Any:
    """Returns a copy of `schema` with `change(schema)` for each schema in it, the inner ones
    first."""
    if not isinstance(schema, dict) or depth == 0:
        return schema
    new = dict(schema)
    for key in ONE:
        if key in new:
            new[key] = mapped(new[key], change, depth - 1)
    for key in LISTS:
        if isinstance(inner := new.get(key), list):
            new[key] = [mapped(item, change, depth - 1) for item in inner]
    for key in NAMED:
        if isinstance(inner := new.get(key), dict):
            new[key] = {name: mapped(item, change, depth - 1) for name, item in inner.items()}
    return change(new)
