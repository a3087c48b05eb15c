"""The answers of one request side by side: to several prompts, and several to one prompt.

A request with several answers is admitted or refused as a whole, see `ListPlaces`.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

from serve_app.api.answer import Answer
from serve_app.api.list_places import ListPlaces
from serve_app.errors import InvalidRequest
from serve_app.protocol.call import JsonObject
from serve_app.protocol.text import TextDelta

MAX_LOGPROBS = 1_000_000
"""Log probabilities in one answer: more than the 20 for each token of Mixtral's whole context."""

ToChunks = Callable[[TextDelta], list[JsonObject]]
"""Makes the response chunks of a delta of one answer."""


def check_size(answers: Sequence[Answer], field: str) -> None:
    """Raises `InvalidRequest` where the log probabilities would take too much memory.

    `field` is the field of the request that asks for them.
    """
    params = [answer.params for answer in answers]
    if params[0].logprobs is None:
        return
    total = sum(each.max_tokens * max(each.logprobs or 0, 1) for each in params)
    if total > MAX_LOGPROBS:
        raise InvalidRequest(
            f"Answers x `{params[0].max_tokens_field}` x `{field}` is {total:,}; {MAX_LOGPROBS:,} "
            "are allowed. Send fewer prompts, or ask for fewer answers, tokens or log "
            "probabilities.",
            param=field,
        )


async def wholes(places: ListPlaces, answers: Sequence[Answer]) -> list[TextDelta]:
    """Waits for all answers; the first failure cancels the others."""
    if len(answers) == 1:
        return [await answers[0].whole()]
    async with places.admitted() as place:
        tasks = [asyncio.create_task(answer.whole(place)) for answer in answers]
        try:
            return await asyncio.gather(*tasks)
        finally:
            await _cancel(tasks)


def streamed(
    places: ListPlaces, answers: Sequence[Answer], to_chunks: Sequence[ToChunks]
) -> AsyncGenerator[JsonObject, None]:
    """The chunks of all answers as they come; raises `QueueFull` first where they are refused."""
    if len(answers) == 1:
        return answers[0].stream(to_chunks[0])
    return _merged(places, answers, to_chunks)


async def _merged(
    places: ListPlaces, answers: Sequence[Answer], to_chunks: Sequence[ToChunks]
) -> AsyncGenerator[JsonObject, None]:
    """The chunks of all answers; the first failure closes all of them."""
    queue: asyncio.Queue[JsonObject | asyncio.Task[None]] = asyncio.Queue()

    async def read(stream: AsyncGenerator[JsonObject, None]) -> None:
        async with aclosing(stream):
            async for chunk in stream:
                queue.put_nowait(chunk)

    async with places.admitted() as place:
        streams = [
            answer.stream(each, place) for answer, each in zip(answers, to_chunks, strict=True)
        ]
        tasks = [asyncio.create_task(read(stream)) for stream in streams]
        for task in tasks:
            task.add_done_callback(queue.put_nowait)  # after the chunks of its stream
        try:
            num_running = len(tasks)
            while num_running:
                item = await queue.get()
                if isinstance(item, asyncio.Task):
                    item.result()  # raises the failure of the stream
                    num_running -= 1
                else:
                    yield item
        finally:
            await _cancel(tasks)


async def _cancel(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
