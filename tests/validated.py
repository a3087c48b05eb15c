"""Compares JSON with a client package's own models, more strictly than the client does."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import pydantic


def validated(kind: Any, value: Any) -> Any:
    """`value` as an object of the model `kind`; fails where a field is missing, of a wrong type, or
    not one of the model's."""
    made = _adapter(kind).validate_python(value)
    assert list(_extra(made)) == []
    return made


@cache
def _adapter(kind: Any) -> pydantic.TypeAdapter[Any]:
    """Takes a second for a union of many events."""
    return pydantic.TypeAdapter(kind)


def _extra(value: Any) -> Iterator[str]:
    """Yields the fields that the models do not have."""
    if isinstance(value, pydantic.BaseModel):
        yield from (f"{type(value).__name__}.{name}" for name in value.model_extra or {})
        for name in type(value).model_fields:
            yield from _extra(getattr(value, name))
    elif isinstance(value, list):
        for each in value:
            yield from _extra(each)
