"""A conversation as OpenAI's clients send it, for every route that takes `messages`.

Knows no chat template: whether roles alternate as the model wants is the template's to say.
"""

from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from serve_app.protocol.fields import printable, sentence

IGNORED = frozenset({"name"})
"""Fields of a message that the chat format has no place for."""

MAX_MESSAGES = 4096

_EMPTY: tuple[Any, ...] = (None, [], "")
_ROLES = ("system", "user", "assistant")


class Message(BaseModel):
    """One message: text, or a list of text parts, which are joined by line ends."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    role: str
    content: str = ""

    @model_validator(mode="before")
    @classmethod
    def _without_empty_fields(cls, value: Any) -> Any:
        """Answers come back as messages with fields such as `"tool_calls": null`."""
        if not isinstance(value, dict):
            raise sentence("Each message should be an object.")
        for name in ("tool_calls", "tool_call_id", "function_call"):
            if value.get(name) not in _EMPTY:
                raise sentence(f"`{name}` is not supported: tool calls are not supported.", name)
        return {
            name: each
            for name, each in value.items()
            if name not in IGNORED and (each not in _EMPTY or name in ("role", "content"))
        }

    @field_validator("role", mode="after")
    @classmethod
    def _known_role(cls, role: str) -> str:
        role = "system" if role == "developer" else role  # OpenAI's newer word
        if role not in _ROLES:
            raise sentence(
                f"The role `{printable(role)}` is not supported; use system, user or assistant."
            )
        return role

    @field_validator("content", mode="before")
    @classmethod
    def _text_of_parts(cls, content: Any) -> Any:
        if content is None:
            return ""
        if isinstance(content, str):
            return content
        if not isinstance(content, list):
            raise sentence("`content` should be a string or a list of text parts.")
        return "\n".join(_text(part) for part in content)

    @model_validator(mode="after")
    def _user_says_something(self) -> "Message":
        if self.role == "user" and not self.content:
            raise sentence("The content of a user message should not be empty.", "content")
        return self


def _a_user_speaks(messages: list[Message]) -> list[Message]:
    # Templates drop a lone system message, and the model would answer to nothing.
    if not any(message.role == "user" for message in messages):
        raise sentence("`messages` should have at least one message of the role user.")
    return messages


Conversation = Annotated[
    list[Message], Field(min_length=1, max_length=MAX_MESSAGES), AfterValidator(_a_user_speaks)
]
"""What may be sent as `messages`."""


def _text(part: Any) -> str:
    match part:
        case {"type": "text", "text": str(text)} if len(part) == 2:
            return text
        case {"type": str(kind)} if kind != "text":
            raise sentence(
                f"Content parts of type `{printable(kind)}` are not supported: send text."
            )
    raise sentence('Each content part should be {"type": "text", "text": "..."}.')


def num_chars(messages: list[Message]) -> int:
    return sum(len(message.content) for message in messages)


def plain(messages: list[Message]) -> list[dict[str, str]]:
    """As the chat template takes them."""
    return [{"role": message.role, "content": message.content} for message in messages]
