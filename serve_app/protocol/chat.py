"""OpenAI's chat completions: the request, the answer, and the chunks of a streamed one.

Protocol: https://platform.openai.com/docs/api-reference/chat. Knows no engine.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from pydantic import Field, model_validator

from serve_app.errors import InvalidRequest
from serve_app.protocol.answer import Generation, Head, TokenNames, finite
from serve_app.protocol.fields import Sampling, usage
from serve_app.protocol.messages import Conversation
from serve_app.protocol.text import TokenScore


class ChatRequest(Sampling):
    """`POST /v1/chat/completions`. Without `max_tokens` the answer may fill the context."""

    messages: Conversation
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """OpenAI's newer name of `max_tokens`."""
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)

    @property
    def limit(self) -> tuple[int | None, str]:
        if self.max_completion_tokens is None:
            return super().limit
        return self.max_completion_tokens, "max_completion_tokens"

    @property
    def num_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    @model_validator(mode="before")
    @classmethod
    def _one_limit(cls, values: dict[str, Any]) -> dict[str, Any]:
        if "max_completion_tokens" not in values:
            return values
        if "max_tokens" in values:
            raise InvalidRequest(
                "Send `max_tokens` or `max_completion_tokens`, not both.",
                param="max_completion_tokens",
            )
        return values

    @model_validator(mode="after")
    def _logprobs_asked_for(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("`top_logprobs` needs `logprobs: true`.", param="top_logprobs")
        return self


async def answer(
    request: ChatRequest, head: Head, generation: Generation, names: TokenNames
) -> dict[str, Any]:
    """The whole answer as a `chat.completion` object."""
    whole = await generation.whole()
    logprobs = _logprobs(request, whole.scores, names) if request.logprobs else None
    return {
        "id": f"chatcmpl-{head.id}",
        "object": "chat.completion",
        "created": head.created,
        "model": head.model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": whole.text, "refusal": None},
                "logprobs": logprobs,
                "finish_reason": whole.finish_reason,
            }
        ],
        "usage": usage(generation.prompt_tokens, whole.num_tokens),
    }


async def chunks(
    request: ChatRequest, head: Head, generation: Generation, names: TokenNames
) -> AsyncGenerator[dict[str, Any], None]:
    """`chat.completion.chunk` objects: the role, the text as it comes, the reason, the usage."""
    extra: dict[str, Any] = {"usage": None} if request.include_usage else {}

    def chunk(choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{head.id}",
            "object": "chat.completion.chunk",
            "created": head.created,
            "model": head.model,
            "choices": choices,
            **extra,
            **more,
        }

    def choice(
        delta: dict[str, str], scores: list[TokenScore], reason: str | None = None
    ) -> list[dict[str, Any]]:
        logprobs = _logprobs(request, scores, names) if request.logprobs and scores else None
        return [{"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}]

    num_tokens, has_role = 0, False
    async with aclosing(generation.pieces):
        async for piece in generation.pieces:
            num_tokens = piece.num_tokens
            if not has_role:
                # Not before the first piece: until then a refusal still has its own status.
                yield chunk(choice({"role": "assistant", "content": ""}, []))
                has_role = True
            if piece.text or piece.scores:
                yield chunk(choice({"content": piece.text}, piece.scores))
            if piece.finish_reason:
                yield chunk(choice({}, [], piece.finish_reason))
    if request.include_usage:
        yield chunk([], usage=usage(generation.prompt_tokens, num_tokens))


def _logprobs(request: ChatRequest, scores: list[TokenScore], names: TokenNames) -> dict[str, Any]:
    def named(token_id: int, logprob: float) -> dict[str, Any]:
        raw = names.token_bytes(token_id)
        text = raw.decode(errors="replace")
        return {"token": text, "logprob": finite(logprob), "bytes": list(raw)}

    content = [
        {
            **named(score.token_id, score.logprob),
            "top_logprobs": [named(*each) for each in score.top[: request.top_logprobs]],
        }
        for score in scores
    ]
    return {"content": content, "refusal": None}
