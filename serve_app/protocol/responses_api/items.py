"""The input items of the Responses API, and the chat messages that they mean."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from serve_app.protocol.fields import Text, printable, sentence
from serve_app.protocol.messages import MAX_MESSAGES, Message

_ITEMS = ("message", "reasoning")
_PARTS = ("input_text", "output_text", "refusal")
_STORED = (
    "Items of type `item_reference` are not supported, because nothing is stored: send the item "
    "itself. Clients do so where their option `store` is false."
)


class _Ignoring(BaseModel):
    # Clients send back every key of an answer.
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


class TextPart(_Ignoring):
    """A text of the client or of an earlier answer."""

    type: Literal["input_text", "output_text"]
    text: Text


class RefusalPart(_Ignoring):
    """An earlier answer of another model that refuses; it is a text."""

    type: Literal["refusal"]
    refusal: Text

    @property
    def text(self) -> str:
        return self.refusal


def _known_part(part: Any) -> Any:
    match part:
        case {"type": str(kind)} if kind not in _PARTS:
            raise sentence(
                f"Content parts of type `{printable(kind)}` are not supported: send text.", "type"
            )
    return part


def _listed_parts(content: Any) -> Any:
    """A string stands for one part."""
    if isinstance(content, str):
        return [{"type": "input_text", "text": content}] if content else []
    if not isinstance(content, list):
        raise sentence("It should be a string or a list of content parts.")
    return content


Part = Annotated[TextPart | RefusalPart, Field(discriminator="type"), BeforeValidator(_known_part)]


class MessageItem(_Ignoring):
    """A message of the client, or an earlier answer."""

    type: Literal["message"]
    role: Literal["user", "assistant", "system", "developer"]
    content: Annotated[list[Part], BeforeValidator(_listed_parts)]

    @model_validator(mode="after")
    def _says_something(self) -> "MessageItem":
        if self.role == "user" and not self.text:
            raise sentence("The content of a user message should not be empty.", "content")
        return self

    @property
    def text(self) -> str:
        """The texts, joined by line ends, as chat joins content parts."""
        return "\n".join(part.text for part in self.content)


class ReasoningItem(_Ignoring):
    """Thoughts of another model before an earlier answer. They are left out of the prompt."""

    type: Literal["reasoning"]


def _typed(item: Any) -> Any:
    """A message may come without its type."""
    match item:
        case {"type": "item_reference"}:
            raise sentence(_STORED, "type")
        case {"type": str(kind)} if kind not in _ITEMS:
            raise sentence(f"Items of type `{printable(kind)}` are not supported.", "type")
        case {"role": _} if "type" not in item:
            return {**item, "type": "message"}
    return item


def _listed(value: Any) -> Any:
    """A string stands for a message of the user."""
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


Item = Annotated[MessageItem | ReasoningItem, Field(discriminator="type"), BeforeValidator(_typed)]
Items = Annotated[
    list[Item], Field(min_length=1, max_length=MAX_MESSAGES), BeforeValidator(_listed)
]
"""The type of the field `input`."""


def conversation(instructions: str | None, items: Sequence[Item]) -> list[Message]:
    """The chat messages of a request."""
    turns = [(item.role, item.text) for item in items if isinstance(item, MessageItem)]
    if instructions:
        turns.insert(0, ("system", instructions))
    return [
        Message.model_construct(role="system" if role == "developer" else role, content=text)
        for role, text in turns
    ]
