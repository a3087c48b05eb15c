"""The content blocks of the Messages API, and their conversion to chat messages."""

import json
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from serve_app.protocol.content_parts import ContentPart, listed, of_types
from serve_app.protocol.field_errors import printable, sentence
from serve_app.protocol.field_types import JsonMap, Text
from serve_app.protocol.messages import MAX_MESSAGES, Message
from serve_app.protocol.tools import ToolCall

_IS_KNOWN = of_types(
    ("text", "thinking", "redacted_thinking", "tool_use", "tool_result"), "Content blocks"
)


class TextBlock(ContentPart):
    """A text; also a block of `system`."""

    type: Literal["text"]
    text: Text


class ThinkingBlock(ContentPart):
    """Thoughts of another model in an earlier answer. They are not part of the prompt."""

    type: Literal["thinking", "redacted_thinking"]


class ToolUseBlock(ContentPart):
    """A call in an earlier answer."""

    type: Literal["tool_use"]
    id: Text = Field(min_length=1)
    name: Text
    input: JsonMap


_IS_LISTED = listed("text", "content blocks")
_Texts = Annotated[list[Annotated[TextBlock, _IS_KNOWN]], _IS_LISTED]


class ToolResultBlock(ContentPart):
    """The result of a call."""

    type: Literal["tool_result"]
    tool_use_id: Text
    content: _Texts = Field(default_factory=list)
    is_error: bool = False

    @property
    def text(self) -> str:
        """The result in the form of the prompt."""
        return f"Error: {joined(self.content)}" if self.is_error else joined(self.content)


Block = Annotated[
    TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock,
    Field(discriminator="type"),
    _IS_KNOWN,
]
System = _Texts
"""The type of the field `system`."""


class InputMessage(ContentPart):
    """One of the `messages`."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[list[Block], _IS_LISTED]

    @property
    def calls(self) -> list[ToolUseBlock]:
        return [block for block in self.content if isinstance(block, ToolUseBlock)]

    @property
    def results(self) -> list[ToolResultBlock]:
        return [block for block in self.content if isinstance(block, ToolResultBlock)]

    @model_validator(mode="after")
    def _fits_its_role(self) -> "InputMessage":
        if self.calls and self.role != "assistant":
            raise sentence("Only messages of the assistant have `tool_use` blocks.", "content")
        if self.results and self.role != "user":
            raise sentence("Only messages of the user have `tool_result` blocks.", "content")
        if self.role == "user" and not self.results and not joined(self.content):
            raise sentence("The content of a user message should not be empty.", "content")
        return self


def _paired(messages: list[InputMessage]) -> list[InputMessage]:
    """Raises an error for calls without a result in the next message, and results without a
    call."""
    open_ids: list[str] = []
    for index, message in enumerate(messages):
        for result in message.results:
            if result.tool_use_id not in open_ids:
                raise sentence(
                    f"The `tool_result` of `{printable(result.tool_use_id)}` should follow a "
                    "message with the `tool_use` block of this id, once.",
                    f"{index}.content",
                )
            open_ids.remove(result.tool_use_id)
        if open_ids:
            break
        open_ids = [block.id for block in message.calls]
        if len(set(open_ids)) < len(open_ids):
            raise sentence("Two `tool_use` blocks have one id.", f"{index}.content")
    if open_ids:
        raise sentence(
            f"The `tool_use` block `{printable(open_ids[0])}` should be followed by its "
            "`tool_result` in the next message."
        )
    return messages


Messages = Annotated[
    list[InputMessage],
    Field(min_length=1, max_length=MAX_MESSAGES),
    AfterValidator(_paired),
]
"""The type of the field `messages`."""


def joined(blocks: Sequence[Block]) -> str:
    """Returns the texts of the blocks, joined by line ends, as chat joins content parts."""
    return "\n".join(block.text for block in blocks if isinstance(block, TextBlock))


def conversation(system: Sequence[TextBlock], messages: Sequence[InputMessage]) -> list[Message]:
    """Returns the chat messages of a request. Results come before the text of their message."""
    turns: list[Message] = []
    if text := joined(system):
        turns.append(_turn("system", text))
    for message in messages:
        turns += [
            Message.model_construct(
                role="tool", content=result.text, tool_call_id=result.tool_use_id
            )
            for result in message.results
        ]
        text = joined(message.content)
        if text or not message.results:
            turns.append(_turn(message.role, text, message.calls))
    return turns


def _turn(role: str, text: str, calls: Sequence[ToolUseBlock] = ()) -> Message:
    tool_calls = tuple(
        ToolCall(call.id, call.name, json.dumps(call.input, ensure_ascii=False)) for call in calls
    )
    return Message.model_construct(role=role, content=text, tool_calls=tool_calls)
