"""OpenAI's completions: raw text continued, for one prompt or several.

Protocol: https://platform.openai.com/docs/api-reference/completions. Knows no engine.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from pydantic import Field, field_validator, model_validator

from serve_app.errors import InvalidRequest
from serve_app.protocol.answer import Generation, Head, TokenNames, finite
from serve_app.protocol.fields import Sampling, usage
from serve_app.protocol.text import Piece, TokenScore

DEFAULT_MAX_TOKENS = 16
MAX_PROMPTS = 256

Prompt = str | list[int]


class CompletionRequest(Sampling):
    """`POST /v1/completions`. `prompts` is `prompt` as a list, whichever form it had."""

    prompts: list[Any] = Field(alias="prompt")
    echo: bool = False
    """The prompt's text stands before the answer's."""
    logprobs: int | None = Field(default=None, ge=0, le=20)

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @field_validator("prompts", mode="before")
    @classmethod
    def _list_of_prompts(cls, value: Any) -> list[Prompt]:
        prompts = [value] if isinstance(value, str) or _are_ids(value) else value
        if isinstance(prompts, list) and len(prompts) > MAX_PROMPTS:
            raise InvalidRequest(f"`prompt` takes up to {MAX_PROMPTS} prompts.", param="prompt")
        if not isinstance(prompts, list) or not all(map(_is_prompt, prompts)):
            raise InvalidRequest(
                "`prompt` should be a string, a list of strings, a list of token ids, or a list "
                "of lists of token ids.",
                param="prompt",
            )
        if not prompts or not all(prompts):
            raise InvalidRequest("`prompt` should not be empty.", param="prompt")
        return prompts

    @model_validator(mode="after")
    def _no_prompt_logprobs(self) -> "CompletionRequest":
        if self.echo and self.logprobs is not None:
            raise InvalidRequest(
                "`echo` with `logprobs` is not supported: only answers have log probabilities.",
                param="echo",
            )
        return self


async def answer(
    request: CompletionRequest,
    head: Head,
    generations: Sequence[Generation],
    echoes: Sequence[str],
    names: TokenNames,
) -> dict[str, Any]:
    """All answers as one `text_completion` object; the first failure cancels the rest."""
    tasks = [asyncio.create_task(generation.whole()) for generation in generations]
    try:
        wholes = await asyncio.gather(*tasks)
    finally:
        await _cancel(tasks)
    num_prompt = sum(generation.prompt_tokens for generation in generations)
    choices = [
        _choice(request, index, whole, echoes[index], names) for index, whole in enumerate(wholes)
    ]
    totals = usage(num_prompt, sum(whole.num_tokens for whole in wholes))
    return {**_envelope(head), "choices": choices, "usage": totals}


async def chunks(
    request: CompletionRequest,
    head: Head,
    generations: Sequence[Generation],
    echoes: Sequence[str],
    names: TokenNames,
) -> AsyncGenerator[dict[str, Any], None]:
    """`text_completion` objects, each with the next text of one prompt; then the usage."""
    extra: dict[str, Any] = {"usage": None} if request.include_usage else {}
    num_tokens = [0] * len(generations)
    unsaid = list(echoes)
    answers = [generation.pieces for generation in generations]
    merged = _merged(answers) if len(answers) > 1 else _numbered(answers[0])
    async with aclosing(merged) as pieces:
        async for index, piece in pieces:
            num_tokens[index] = piece.num_tokens
            if piece.text or piece.scores or piece.finish_reason or unsaid[index]:
                choice = _choice(request, index, piece, unsaid[index], names)
                unsaid[index] = ""
                yield {**_envelope(head), "choices": [choice], **extra}
    if request.include_usage:
        num_prompt = sum(generation.prompt_tokens for generation in generations)
        totals = usage(num_prompt, sum(num_tokens))
        yield {**_envelope(head), "choices": [], "usage": totals}


def _envelope(head: Head) -> dict[str, Any]:
    return {
        "id": f"cmpl-{head.id}",
        "object": "text_completion",
        "created": head.created,
        "model": head.model,
    }


def _choice(
    request: CompletionRequest, index: int, piece: Piece, echo: str, names: TokenNames
) -> dict[str, Any]:
    with_scores = request.logprobs is not None and (piece.scores or piece.finish_reason)
    return {
        "index": index,
        "text": echo + piece.text,
        "logprobs": _logprobs(piece.scores, request.logprobs or 0, names) if with_scores else None,
        "finish_reason": piece.finish_reason,
    }


def _logprobs(scores: list[TokenScore], num_top: int, names: TokenNames) -> dict[str, Any]:
    def name(token_id: int) -> str:
        raw = names.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            # OpenAI's spelling of a part of a character.
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def top(score: TokenScore) -> dict[str, float]:
        pairs = (*score.top[:num_top], (score.token_id, score.logprob))
        return {name(token_id): finite(logprob) for token_id, logprob in pairs}

    return {
        "tokens": [name(score.token_id) for score in scores],
        "token_logprobs": [finite(score.logprob) for score in scores],
        "top_logprobs": [top(score) for score in scores],
        "text_offset": [score.offset for score in scores],
    }


async def _numbered(
    stream: AsyncGenerator[Piece, None],
) -> AsyncGenerator[tuple[int, Piece], None]:
    """`_merged` for one stream, which needs no task beside the reader's."""
    async with aclosing(stream):
        async for piece in stream:
            yield 0, piece


async def _merged(
    streams: Sequence[AsyncGenerator[Piece, None]],
) -> AsyncGenerator[tuple[int, Piece], None]:
    """The pieces of all streams as they come, with the stream's index; closes all of them."""
    queue: asyncio.Queue[tuple[int, Piece | None]] = asyncio.Queue()

    async def pump(index: int) -> None:
        async with aclosing(streams[index]):
            async for piece in streams[index]:
                queue.put_nowait((index, piece))

    tasks = [asyncio.create_task(pump(index)) for index in range(len(streams))]
    for task in tasks:
        # After the task's own items, so that what failed it is heard in its turn.
        task.add_done_callback(lambda task: queue.put_nowait((tasks.index(task), None)))
    try:
        num_running = len(tasks)
        while num_running:
            index, piece = await queue.get()
            if piece is not None:
                yield index, piece
                continue
            tasks[index].result()  # raises what ended it
            num_running -= 1
    finally:
        await _cancel(tasks)


async def _cancel(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(each) is int for each in value)


def _is_prompt(value: Any) -> bool:
    return isinstance(value, str) or value == [] or _are_ids(value)
