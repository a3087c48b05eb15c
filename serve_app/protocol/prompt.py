"""The request of `/prompt`, with one prompt or conversation or a list of them, and its response."""

from dataclasses import dataclass
from typing import Any

from pydantic import Field, model_validator

from serve_app.errors import InvalidRequest
from serve_app.protocol.call import JsonObject, Progress
from serve_app.protocol.field_types import Text
from serve_app.protocol.fields import Sampling
from serve_app.protocol.messages import Conversation, Message
from serve_app.protocol.response import ResponseMetadata, usage
from serve_app.protocol.text import TextDelta

DEFAULT_MAX_TOKENS = 512
LISTS = ("prompts", "items")
"""The two names of the field with a list of prompts."""


class PromptSampling(Sampling):
    """The sampling fields of `/prompt`, with its own default temperature."""

    OWN_DEFAULTS = frozenset({"temperature"})

    temperature: float = Field(default=0.7, ge=0, le=2, allow_inf_nan=False)


class PromptRequest(PromptSampling):
    """`POST /prompt` with `prompt` or `messages`."""

    prompt: Text | None = None
    messages: Conversation | None = None

    @model_validator(mode="before")
    @classmethod
    def _prompt_or_messages(cls, values: dict[str, Any]) -> dict[str, Any]:
        if "prompt" in values and "messages" in values:
            raise InvalidRequest("Send `prompt` or `messages`, not both.", param="messages")
        if "prompt" not in values and "messages" not in values:
            raise InvalidRequest("`prompt` or `messages` is required.", param="prompt")
        if values.get("prompt", "?") == "":
            raise InvalidRequest("`prompt` should not be empty.", param="prompt")
        if values.get("messages", "?") == []:
            raise InvalidRequest("`messages` should not be empty.", param="messages")
        return values

    @property
    def conversation(self) -> list[Message]:
        """The messages, or the prompt as one user message."""
        return self.messages or [Message.model_construct(role="user", content=self.prompt or "")]


@dataclass(frozen=True, slots=True)
class Batch:
    """A list of prompts. Its items are validated later, so that only a bad item fails."""

    items: list[Any]
    shared: dict[str, Any]
    """Fields that apply to all items. They are validated; an item may override them."""

    def read(self, item: Any) -> PromptRequest:
        """Returns the request in one of `items`; a string is a prompt. Raises `InvalidRequest`."""
        item = {"prompt": item} if isinstance(item, str) else item
        if not isinstance(item, dict):
            raise InvalidRequest("Each item should be a string or an object.", param="items")
        fields = {name: value for name, value in item.items() if value is not None}
        request = PromptRequest.read({**self.shared, **fields})
        if request.stream:
            raise _unstreamable()
        return request


def read(body: Any, max_prompts: int) -> PromptRequest | Batch:
    """Returns the request in the body of `/prompt`: for one prompt, or for a list of them.

    An empty list is a batch without items. Raises `InvalidRequest` if a field is wrong; for a list,
    if the list itself or a shared field is wrong.
    """
    names = [name for name in LISTS if isinstance(body, dict) and body.get(name) is not None]
    if not names:
        return PromptRequest.read(body)
    shared = {key: value for key, value in body.items() if key not in LISTS}
    listed = body[names[0]]
    if len(names) > 1:
        raise InvalidRequest("Send `prompts` or `items`, not both.", param="items")
    if not isinstance(listed, list) or len(listed) > max_prompts:
        raise InvalidRequest(
            f"`{names[0]}` should be a list of at most {max_prompts:,} prompts.", param=names[0]
        )
    for name in ("prompt", "messages"):
        if shared.get(name) is not None:
            raise InvalidRequest(f"Send `{names[0]}` or `{name}`, not both.", param=name)
    if shared.get("stream"):
        raise _unstreamable()
    PromptSampling.read(shared)
    return Batch(listed, shared)


def progress(num_done: int, total: int) -> Progress:
    """Returns the progress of a list of prompts."""
    return {"progress": num_done * 100 // total, "message": f"{num_done} of {total} done"}


def _unstreamable() -> InvalidRequest:
    return InvalidRequest("A list of prompts cannot be streamed.", param="stream")


def body(metadata: ResponseMetadata, num_prompt_tokens: int, whole: TextDelta) -> JsonObject:
    """Returns the response `{"text", "finish_reason", "usage", "model"}`."""
    return {
        "text": whole.text,
        "finish_reason": whole.finish_reason,
        "usage": usage(num_prompt_tokens, whole.num_tokens),
        "model": metadata.model,
    }


def chunks(
    metadata: ResponseMetadata, num_prompt_tokens: int, delta: TextDelta
) -> list[JsonObject]:
    """Returns the chunks of a delta: `{"token", "finished": false}` for text, and a last one with
    the finish reason and the usage."""
    chunks: list[JsonObject] = []
    if delta.text:
        chunks.append({"token": delta.text, "finished": False})
    if delta.finish_reason is not None:
        chunks.append(
            {
                "token": "",
                "finished": True,
                "finish_reason": delta.finish_reason,
                "usage": usage(num_prompt_tokens, delta.num_tokens),
                "model": metadata.model,
            }
        )
    return chunks
