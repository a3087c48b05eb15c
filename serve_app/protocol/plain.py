"""`/prompt`, the plain route: one user turn or a conversation in, text out; and lists of them.

Knows no engine.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from pydantic import Field, model_validator

from serve_app.errors import InvalidRequest
from serve_app.protocol.answer import Generation, Head
from serve_app.protocol.call import Progress
from serve_app.protocol.fields import Sampling, usage, used_fields
from serve_app.protocol.messages import Conversation, Message

DEFAULT_MAX_TOKENS = 512
MAX_ITEMS = 1000


class PlainSampling(Sampling):
    """The sampling fields of `/prompt`, with its own default."""

    temperature: float = Field(default=0.7, ge=0, le=2, allow_inf_nan=False)


class PromptRequest(PlainSampling):
    """`POST /prompt` with `prompt` or `messages`."""

    prompt: str | None = None
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
    def text_field(self) -> str:
        """Where the text came from, for errors about it."""
        return "messages" if self.prompt is None else "prompt"

    @property
    def conversation(self) -> list[Message]:
        return self.messages or [Message(role="user", content=self.prompt or "")]


@dataclass(frozen=True, slots=True)
class Batch:
    """A list of prompts. What is in it is not looked at any further: a bad item fails alone."""

    items: list[Any]
    shared: dict[str, Any]
    """The fields of every item that does not bring its own; their values are valid."""

    def read(self, item: Any) -> PromptRequest:
        """One of `items`; a string is a body with that `prompt`. Raises `InvalidRequest`."""
        item = {"prompt": item} if isinstance(item, str) else item
        if not isinstance(item, dict):
            raise InvalidRequest("Each item should be a string or an object.", param="items")
        request = PromptRequest.of({**self.shared, **used_fields(item)})
        if request.stream:
            raise _unstreamable()
        return request


def batch(body: Any) -> Batch | None:
    """The batch in a `/prompt` body; None if it is none.

    Raises `InvalidRequest` for what is wrong with all of it: the list, and the shared fields.
    """
    if not isinstance(body, dict):
        return None
    names = [name for name in ("prompts", "items") if body.get(name) is not None]
    if not names:
        return None
    shared = {key: value for key, value in body.items() if key not in ("prompts", "items")}
    listed = body[names[0]]
    if len(names) > 1:
        raise InvalidRequest("Send `prompts` or `items`, not both.", param="items")
    if not isinstance(listed, list) or not 1 <= len(listed) <= MAX_ITEMS:
        raise InvalidRequest(
            f"`{names[0]}` should be a list of 1 to {MAX_ITEMS} prompts.", param=names[0]
        )
    for name in ("prompt", "messages"):
        if shared.get(name) is not None:
            raise InvalidRequest(f"Send `{names[0]}` or `{name}`, not both.", param=name)
    if shared.get("stream"):
        raise _unstreamable()
    shared = used_fields(shared)
    PlainSampling.of(shared)
    return Batch(listed, shared)


def progress(num_done: int, total: int) -> Progress:
    """How far a batch is: `{"progress": percent, "message": "4 of 10 done"}`."""
    return {"progress": num_done * 100 // total, "message": f"{num_done} of {total} done"}


def _unstreamable() -> InvalidRequest:
    return InvalidRequest("A list of prompts cannot be streamed.", param="stream")


async def answer(head: Head, generation: Generation) -> dict[str, Any]:
    """`{"text", "finish_reason", "usage", "model"}`."""
    whole = await generation.whole()
    return {
        "text": whole.text,
        "finish_reason": whole.finish_reason,
        "usage": usage(generation.prompt_tokens, whole.num_tokens),
        "model": head.model,
    }


async def chunks(head: Head, generation: Generation) -> AsyncGenerator[dict[str, Any], None]:
    """`{"token", "finished": false}` as text comes, then the end with reason and usage."""
    async with aclosing(generation.pieces):
        async for piece in generation.pieces:
            if piece.text:
                yield {"token": piece.text, "finished": False}
            if piece.finish_reason:
                yield {
                    "token": "",
                    "finished": True,
                    "finish_reason": piece.finish_reason,
                    "usage": usage(generation.prompt_tokens, piece.num_tokens),
                    "model": head.model,
                }
