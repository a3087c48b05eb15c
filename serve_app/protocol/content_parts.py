"""Validators of content parts, which the Responses and the Messages API share."""

from collections.abc import Collection
from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

from serve_app.protocol.fields import printable, sentence


class ContentPart(BaseModel):
    """A part of a conversation. Unknown keys are ignored: clients send back every key of an answer,
    and mark parts with keys of their own."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


def of_types(types: Collection[str], noun: str) -> BeforeValidator:
    """Refuses a part of a type that is none of `types`; the error calls parts `noun`."""

    def check(part: Any) -> Any:
        match part:
            case {"type": str(kind)} if kind not in types:
                raise sentence(
                    f"{noun} of type `{printable(kind)}` are not supported: send text.", "type"
                )
        return part

    return BeforeValidator(check)


def listed(text_type: str, noun: str) -> BeforeValidator:
    """Makes a list of parts of a string, which stands for one part of `text_type`, and of null."""

    def to_list(content: Any) -> Any:
        if content is None or content == "":
            return []
        if isinstance(content, str):
            return [{"type": text_type, "text": content}]
        if not isinstance(content, list):
            raise sentence(f"It should be a string or a list of {noun}.")
        return content

    return BeforeValidator(to_list)
