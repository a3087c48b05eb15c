"""The errors of a request body: one sentence each, with the path of the field."""

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from serve_app.errors import InvalidRequest

_SENTENCE = "sentence"
_AN_OBJECT = "`{field}` should be a JSON object."
_MESSAGES = {
    "dataclass_type": _AN_OBJECT,
    "dict_type": _AN_OBJECT,
    "extra_forbidden": "`{field}` is not a field of this request.",
    "finite_number": "`{field}` is a number out of range.",
    "missing": "`{field}` is required.",
    "model_attributes_type": _AN_OBJECT,
    "model_type": _AN_OBJECT,
    "string_unicode": "`{field}` has a lone surrogate, which is no character.",
    "too_long": "`{field}` should have at most {max_length} items.",
    "too_short": "`{field}` should not be empty.",
    "union_tag_invalid": "`{field}` should be {expected_tags}.",
    "union_tag_not_found": "`{field}` is required.",
}
"""The sentence for pydantic's types of errors. Any other type has pydantic's own message."""


def printable(name: Any) -> str:
    """Returns a client's text, cut to 64 characters and safe for an error message."""
    return str(name)[:64].encode("utf-8", "replace").decode()


def sentence(message: str, field: str | None = None) -> PydanticCustomError:
    """Returns an error for validators of nested values, which do not know their path in the body.

    The client gets `message` unchanged. `param` is the path of the validated value, plus `field`.
    """
    context = None if field is None else {"field": field}
    return PydanticCustomError(_SENTENCE, message, context)


def no_unicode(field: str) -> InvalidRequest:
    """Returns the error for a text that UTF-8 cannot encode, such as one with `\\ud800`."""
    return InvalidRequest(_MESSAGES["string_unicode"].format(field=field), param=field)


def first_error(error: ValidationError, body: dict[str, Any]) -> InvalidRequest:
    """Returns pydantic's first error for `body` as one sentence that names the field."""
    first = error.errors(include_url=False, include_input=False)[0]
    kind, context = first["type"], first.get("ctx", {})
    inner = []
    if kind == _SENTENCE and "field" in context:
        inner = [context["field"]]
    if kind.startswith("union_tag"):
        inner = [context["discriminator"].strip("'")]
    field = printable(".".join(map(str, _path(first, body, inner))))
    if kind == _SENTENCE:
        return InvalidRequest(first["msg"], param=field)
    if kind in _MESSAGES:
        return InvalidRequest(_MESSAGES[kind].format_map({**context, "field": field}), param=field)
    message = first["msg"].removeprefix("Input ").rstrip(".")
    return InvalidRequest(f"`{field}` {message[:1].lower()}{message[1:]}.", param=field)


def _path(error: ErrorDetails, body: dict[str, Any], inner: list[str]) -> list[str | int]:
    """Returns the keys and positions that lead to the error's value in `body`, plus `inner`.

    pydantic's `loc` also contains the names of a union's members, which are not keys of the body:
    `tool_use` in `("content", 0, "tool_use", "id")`. The path ends at a text that a validator has
    converted to a list.
    """
    path: list[str | int] = []
    value: Any = body
    loc: Sequence[str | int] = error["loc"]
    for index, key in enumerate(loc):
        if not isinstance(value, dict | list):
            return path
        is_missing = error["type"] == "missing" and index == len(loc) - 1
        if isinstance(value, dict) and (key in value or is_missing):
            value = value.get(key)
        elif isinstance(value, list) and isinstance(key, int):
            value = value[key]
        else:
            continue
        path.append(key)
    return [*path, *inner]
