"""Chat messages in OpenAI's form, for every route with `messages`.

The chat template checks whether roles alternate in the way that the model needs.
"""

import json
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from serve_app.protocol.field_errors import printable, sentence
from serve_app.protocol.field_types import Text, is_unicode
from serve_app.protocol.tools import ToolCall

MAX_MESSAGES = 4096

_EMPTY: tuple[Any, ...] = (None, [], "")
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
"""OpenAI's roles, and the role of the chat template for each."""


class Message(BaseModel):
    """One message. `content` is a text; a list of text parts is joined by line ends.

    Other keys are ignored, also those of content parts: clients keep their own data there, and send
    back every key of an answer.
    """

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    role: str
    content: Text = ""
    tool_calls: tuple[ToolCall, ...] = ()
    """The tool calls of an assistant's message."""
    tool_call_id: Text | None = None
    """The id of the call whose result this message contains (role tool)."""

    @model_validator(mode="before")
    @classmethod
    def _normalize(cls, value: Any) -> Any:
        """Removes null fields, which clients send back with an answer, such as `"tool_calls":
        null`."""
        if not isinstance(value, dict):
            raise sentence("Each message should be an object.")
        if value.get("function_call") not in _EMPTY:
            raise sentence("`function_call` is not supported: use `tool_calls`.", "function_call")
        fields = {k: v for k, v in value.items() if v not in _EMPTY}
        content = fields.get("content", "")
        if not isinstance(content, str):
            fields["content"] = content = _joined(content)
        role = value.get("role")
        if isinstance(role, str):
            if role not in _ROLES:
                raise sentence(
                    f"The role `{printable(role)}` is not supported; use system, user, assistant "
                    "or tool.",
                    "role",
                )
            fields["role"] = role = _ROLES[role]
        elif "role" in value:
            fields["role"] = role  # has a wrong type, which pydantic refuses
        if role == "user" and not content:
            raise sentence("The content of a user message should not be empty.", "content")
        if "tool_calls" in fields:
            fields["tool_calls"] = _read_calls(fields["tool_calls"], role)
        if role == "tool" and not isinstance(fields.get("tool_call_id"), str):
            raise sentence("A message of the role tool needs `tool_call_id`.", "tool_call_id")
        return fields


def _checked(messages: list[Message]) -> list[Message]:
    """Raises an error for a conversation without a user, results without a call, or calls without a
    result.

    Some templates drop a single system message, so that the model would answer an empty prompt.
    OpenAI and Mistral check results in the same way.
    """
    has_user = False
    open_ids: dict[str, int] = {}
    for index, message in enumerate(messages):
        has_user |= message.role == "user"
        if message.role == "tool":
            if open_ids.pop(message.tool_call_id or "", None) is None:
                raise sentence(
                    f"The result of `{printable(message.tool_call_id)}` should follow a message of "
                    "the assistant that has this id in `tool_calls`, once.",
                    f"{index}.tool_call_id",
                )
        elif open_ids:
            break
        else:
            open_ids = {call.id: index for call in message.tool_calls}
    if open_ids:
        call_id, index = next(iter(open_ids.items()))
        raise sentence(
            f"The call `{printable(call_id)}` should be followed by a message of the role tool "
            "with its result.",
            f"{index}.tool_calls",
        )
    if not has_user:
        raise sentence("`messages` should have at least one message of the role user.")
    return messages


Conversation = Annotated[
    list[Message],
    Field(min_length=1, max_length=MAX_MESSAGES),
    AfterValidator(_checked),
]
"""The type of the field `messages`."""


def _joined(parts: Any) -> str:
    """Returns the text of a list of content parts."""
    if not isinstance(parts, list):
        raise sentence("`content` should be a string or a list of text parts.", "content")
    texts = []
    for part in parts:
        match part:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case {"type": "refusal", "refusal": str(text)}:  # of an earlier answer
                texts.append(text)
            case {"type": str(kind)} if kind != "text":
                raise sentence(
                    f"Content parts of type `{printable(kind)}` are not supported: send text.",
                    "content",
                )
            case _:
                raise sentence(
                    'Each content part should be {"type": "text", "text": "..."}.', "content"
                )
    return "\n".join(texts)


def _read_calls(calls: Any, role: Any) -> tuple[ToolCall, ...]:
    """Returns the calls of an assistant's message. Arguments are JSON text, or an object."""
    if role != "assistant":
        raise sentence("Only messages of the assistant have `tool_calls`.", "tool_calls")
    if not isinstance(calls, list):
        raise sentence("`tool_calls` should be a list.", "tool_calls")
    result: list[ToolCall] = []
    for index, call in enumerate(calls):
        match call:
            case {"id": str(call_id), "function": {"name": str(name), **function}} if call_id:
                arguments = function.get("arguments") or "{}"
            case _:
                raise sentence(
                    'Each call should be {"id": "...", "type": "function", "function": '
                    '{"name": "...", "arguments": "..."}}.',
                    f"tool_calls.{index}",
                )
        if isinstance(arguments, dict):
            arguments = json.dumps(arguments, ensure_ascii=False)
        if not isinstance(arguments, str):
            raise sentence(
                "`arguments` should be JSON as text.", f"tool_calls.{index}.function.arguments"
            )
        if any(call_id == earlier.id for earlier in result):
            raise sentence("Two calls have one id.", f"tool_calls.{index}.id")
        if not is_unicode([call_id, name, arguments]):
            raise sentence(
                "The call has a lone surrogate, which is no character.", f"tool_calls.{index}"
            )
        result.append(ToolCall(call_id, name, arguments))
    return tuple(result)
