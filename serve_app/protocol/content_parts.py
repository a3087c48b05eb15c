"""Validators of content parts for the Responses and the Messages API."""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

from serve_app.protocol.field_errors import printable, sentence


class ContentPart(BaseModel):
    """A part of a conversation. Unknown keys are ignored: clients send back every key of an answer,
    and add their own keys to parts."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


def of_types(types: Sequence[str], noun: str) -> BeforeValidator:
    """Returns a validator that refuses parts of other types than `types`. Errors recommend the
    first one, and `noun` names a part in them."""

    def check(part: Any) -> Any:
        match part:
            case {"type": str(kind)} if kind not in types:
                raise sentence(
                    f"{noun} of type `{printable(kind)}` are not supported: send text, as "
                    f"`{types[0]}`.",
                    "type",
                )
        return part

    return BeforeValidator(check)


def listed(text_type: str, noun: str) -> BeforeValidator:
    """Returns a validator that converts a string to a list with one part of `text_type`, and null
    to an empty list."""

    def to_list(content: Any) -> Any:
        if content is None or content == "":
            return []
        if isinstance(content, str):
            return [{"type": text_type, "text": content}]
        if not isinstance(content, list):
            raise sentence(f"It should be a string or a list of {noun}.")
        return content

    return BeforeValidator(to_list)
