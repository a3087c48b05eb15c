"""The content blocks of the Messages API, and the chat messages that they mean."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from serve_app.protocol.fields import Text, printable, sentence
from serve_app.protocol.messages import MAX_MESSAGES, Message

_KNOWN = ("text", "thinking", "redacted_thinking")


class _Ignoring(BaseModel):
    # Clients mark blocks with `cache_control` and send back every key of an answer.
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


class TextBlock(_Ignoring):
    """A text; also a block of `system`."""

    type: Literal["text"]
    text: Text


class ThinkingBlock(_Ignoring):
    """Thoughts of another model in an earlier answer. They are left out of the prompt."""

    type: Literal["thinking", "redacted_thinking"]


def _known(block: Any) -> Any:
    match block:
        case {"type": str(kind)} if kind not in _KNOWN:
            raise sentence(
                f"Content blocks of type `{printable(kind)}` are not supported: send text.", "type"
            )
    return block


def _listed(content: Any) -> Any:
    """A string stands for one block of text."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    if not isinstance(content, list):
        raise sentence("It should be a string or a list of content blocks.")
    return content


Block = Annotated[TextBlock | ThinkingBlock, Field(discriminator="type"), BeforeValidator(_known)]
System = Annotated[list[TextBlock], BeforeValidator(_listed)]
"""The type of the field `system`."""


class InputMessage(_Ignoring):
    """One of the `messages`."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[list[Block], BeforeValidator(_listed)]

    @model_validator(mode="after")
    def _says_something(self) -> "InputMessage":
        if self.role == "user" and not joined(self.content):
            raise sentence("The content of a user message should not be empty.", "content")
        return self


Messages = Annotated[list[InputMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
"""The type of the field `messages`."""


def joined(blocks: Sequence[Block]) -> str:
    """The texts of the blocks, joined by line ends, as chat joins content parts."""
    return "\n".join(block.text for block in blocks if isinstance(block, TextBlock))


def conversation(system: Sequence[TextBlock], messages: Sequence[InputMessage]) -> list[Message]:
    """The chat messages of a request."""
    turns = [(message.role, joined(message.content)) for message in messages]
    if text := joined(system):
        turns.insert(0, ("system", text))
    return [Message.model_construct(role=role, content=text) for role, text in turns]
