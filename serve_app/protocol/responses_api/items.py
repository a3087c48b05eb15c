"""The input items of the Responses API, and their conversion to chat messages."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from serve_app.protocol.content_parts import ContentPart, listed, of_types
from serve_app.protocol.field_errors import printable, sentence
from serve_app.protocol.field_types import Text
from serve_app.protocol.messages import MAX_MESSAGES, Message
from serve_app.protocol.tools import ToolCall

_ITEMS = ("message", "reasoning", "function_call", "function_call_output")
_STORED = (
    "Items of type `item_reference` are not supported, because nothing is stored: send the item "
    "itself. Clients do so where their option `store` is false."
)


class TextPart(ContentPart):
    """A text of the client or of an earlier answer."""

    type: Literal["input_text", "output_text"]
    text: Text


class RefusalPart(ContentPart):
    """A refusal by another model in an earlier answer. It is treated as text."""

    type: Literal["refusal"]
    refusal: Text

    @property
    def text(self) -> str:
        return self.refusal


Part = Annotated[
    TextPart | RefusalPart,
    Field(discriminator="type"),
    of_types(("input_text", "output_text", "refusal"), "Content parts"),
]
Parts = Annotated[list[Part], listed("input_text", "content parts")]


def _joined(parts: Sequence[Part]) -> str:
    """Returns the texts, joined by line ends, as chat joins content parts."""
    return "\n".join(part.text for part in parts)


class MessageItem(ContentPart):
    """A message of the client, or an earlier answer."""

    type: Literal["message"]
    role: Literal["user", "assistant", "system", "developer"]
    content: Parts

    @model_validator(mode="after")
    def _says_something(self) -> "MessageItem":
        if self.role == "user" and not _joined(self.content):
            raise sentence("The content of a user message should not be empty.", "content")
        return self


class ReasoningItem(ContentPart):
    """Thoughts of another model before an earlier answer. They are not part of the prompt."""

    type: Literal["reasoning"]


class CallItem(ContentPart):
    """A call in an earlier answer."""

    type: Literal["function_call"]
    call_id: Text = Field(min_length=1)
    name: Text
    arguments: Text


class ResultItem(ContentPart):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: Text
    output: Parts


def _typed(item: Any) -> Any:
    """Adds the type to a message without one."""
    match item:
        case {"type": "item_reference"}:
            raise sentence(_STORED, "type")
        case {"type": str(kind)} if kind not in _ITEMS:
            raise sentence(f"Items of type `{printable(kind)}` are not supported.", "type")
        case {"role": _} if item.get("type") is None:
            return {**item, "type": "message"}
    return item


def _listed(value: Any) -> Any:
    """Converts a string to a message of the user."""
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


Item = Annotated[
    MessageItem | ReasoningItem | CallItem | ResultItem,
    Field(discriminator="type"),
    BeforeValidator(_typed),
]


def _paired(items: list[Item]) -> list[Item]:
    """Raises an error for calls without a result, results without a call, and input without a
    question."""
    open_ids: list[str] = []
    for index, item in enumerate(items):
        if isinstance(item, CallItem):
            if item.call_id in open_ids:
                raise sentence("Two calls have one `call_id`.", f"{index}.call_id")
            open_ids.append(item.call_id)
        elif isinstance(item, ResultItem):
            if item.call_id not in open_ids:
                raise sentence(
                    f"The output of `{printable(item.call_id)}` should follow a `function_call` "
                    "with this `call_id`, once.",
                    f"{index}.call_id",
                )
            open_ids.remove(item.call_id)
    if open_ids:
        raise sentence(
            f"The `function_call` of `{printable(open_ids[0])}` should be followed by its "
            "`function_call_output`."
        )
    if not any(isinstance(item, MessageItem) and item.role == "user" for item in items):
        raise sentence("`input` should have at least one message of the role user.")
    return items


Items = Annotated[
    list[Item],
    Field(min_length=1, max_length=MAX_MESSAGES),
    BeforeValidator(_listed),
    AfterValidator(_paired),
]
"""The type of the field `input`."""


def conversation(instructions: str | None, items: Sequence[Item]) -> list[Message]:
    """Returns the chat messages of a request. Calls are added to the assistant's message before
    them."""
    turns: list[Message] = []
    if instructions:
        turns.append(Message.model_construct(role="system", content=instructions))
    for item in items:
        match item:
            case MessageItem(role=role):
                role = "system" if role == "developer" else role
                turns.append(Message.model_construct(role=role, content=_joined(item.content)))
            case CallItem():
                call = ToolCall(item.call_id, item.name, item.arguments or "{}")
                last = turns.pop() if turns and turns[-1].role == "assistant" else _ASSISTANT
                calls = (*last.tool_calls, call)
                turns.append(last.model_copy(update={"tool_calls": calls}))
            case ResultItem():
                text = _joined(item.output)
                turns.append(
                    Message.model_construct(role="tool", content=text, tool_call_id=item.call_id)
                )
    return turns


_ASSISTANT = Message.model_construct(role="assistant", content="")
