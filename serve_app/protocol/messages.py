"""Chat messages as OpenAI's clients send them, for every route that takes `messages`.

Whether roles alternate as the model wants is checked by the chat template, not here.
"""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from serve_app.protocol.fields import Text, printable, sentence

MAX_MESSAGES = 4096

_EMPTY: tuple[Any, ...] = (None, [], "")
_UNSUPPORTED = ("tool_calls", "tool_call_id", "function_call")
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""OpenAI's roles, and the chat template's role for each."""


class Message(BaseModel):
    """One message. `content` is text; a list of text parts is joined by line ends.

    Other keys are ignored, also those of content parts: clients keep their own data there, and send
    back every key of an answer.
    """

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    role: str
    content: Text = ""

    @model_validator(mode="before")
    @classmethod
    def _normalize(cls, value: Any) -> Any:
        """Drops empty fields, which clients send back with an answer: `"tool_calls": null`."""
        if not isinstance(value, dict):
            raise sentence("Each message should be an object.")
        for name in _UNSUPPORTED:
            if value.get(name) not in _EMPTY:
                raise sentence(f"`{name}` is not supported: tool calls are not supported.", name)
        fields = {k: v for k, v in value.items() if v not in _EMPTY}
        content = fields.get("content", "")
        if not isinstance(content, str):
            fields["content"] = content = _joined(content)
        role = value.get("role")
        if isinstance(role, str):
            if role not in _ROLES:
                raise sentence(
                    f"The role `{printable(role)}` is not supported; use system, user or "
                    "assistant.",
                    "role",
                )
            fields["role"] = role = _ROLES[role]
        elif "role" in value:
            fields["role"] = role  # has a wrong type, which pydantic refuses
        if role == "user" and not content:
            raise sentence("The content of a user message should not be empty.", "content")
        return fields


def _has_user(messages: list[Message]) -> list[Message]:
    # Templates drop a lone system message, and the model would answer to nothing.
    if not any(message.role == "user" for message in messages):
        raise sentence("`messages` should have at least one message of the role user.")
    return messages


Conversation = Annotated[
    list[Message], Field(min_length=1, max_length=MAX_MESSAGES), AfterValidator(_has_user)
]
"""The type of the field `messages`."""


def _joined(parts: Any) -> str:
    """The text of a list of content parts."""
    if not isinstance(parts, list):
        raise sentence("`content` should be a string or a list of text parts.", "content")
    texts = []
    for part in parts:
        match part:
            case {"type": "text", "text": str(text)}:
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
