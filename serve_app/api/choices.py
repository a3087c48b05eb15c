"""Runs the answers of one request concurrently: to several prompts, and several to one prompt.

A request with several answers is admitted or refused as a whole, see `ListPlaces`.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from typing import Any

from serve_app.api.answer import Answer
from serve_app.api.list_places import ListPlaces
from serve_app.errors import InvalidRequest
from serve_app.protocol.call import JsonObject, JsonReply
from serve_app.protocol.text import TextDelta

MAX_LOGPROBS = 1_000_000
"""Maximum number of log probabilities in one response. Mixtral's context with 20 per token has
655,360."""
MAX_CHUNKS_AT_ONCE = 16
"""Number of chunks of a stream that are sent before other requests run."""
MAX_SCORES_ON_LOOP = 200
"""Maximum number of tokens with log probabilities in a body that is created on the event loop. A
larger body would delay other requests noticeably."""

ToChunks = Callable[[TextDelta], Iterable[JsonObject]]
"""Returns the response chunks for a delta of one answer."""


def check_size(answers: Sequence[Answer], field: str, limit: int = MAX_LOGPROBS) -> None:
    """Raises `InvalidRequest` if `answers` may have more than `limit` log probabilities together.

    `field` is the request field for log probabilities, which the error names.
    """
    total = sum(_num_logprobs(answer) for answer in answers)
    if total > limit:
        tokens = f"`{answers[0].params.max_tokens_field}`"
        if answers[0].params.prompt_logprobs is not None:
            tokens = f"(tokens of the prompt + {tokens})"
        raise InvalidRequest(
            f"Answers x {tokens} x `{field}` is {total:,}; {limit:,} are allowed. Send "
            "fewer prompts, or ask for fewer answers, tokens or log probabilities.",
            param=field,
        )


def _num_logprobs(answer: Answer) -> int:
    """Returns the number of log probabilities in an answer; a token without candidates counts as
    one."""
    params, total = answer.params, 0
    if params.logprobs is not None:
        total += params.max_tokens * max(params.logprobs, 1)
    if params.prompt_logprobs is not None:
        total += len(answer.prompt_ids) * max(params.prompt_logprobs, 1)
    return total


async def reply(
    places: ListPlaces,
    answers: Sequence[Answer],
    to_body: Callable[[Sequence[TextDelta]], JsonObject],
) -> JsonReply:
    """Waits for all answers. Returns the response with their body.

    The first failure cancels the other answers and is raised. A body with many log probabilities
    is created in a thread.
    """
    if len(answers) == 1:
        wholes = [await answers[0].whole()]
    else:
        wholes = await _wholes(places, answers)
    params = answers[0].params
    if params.logprobs is None and params.prompt_logprobs is None:
        return JsonReply(to_body(wholes))
    if sum(map(_num_scores, wholes)) <= MAX_SCORES_ON_LOOP:
        return JsonReply(to_body(wholes))
    return JsonReply(await asyncio.to_thread(to_body, wholes), is_large=True)


async def _wholes(places: ListPlaces, answers: Sequence[Answer]) -> list[TextDelta]:
    async with places.admitted(answers[0].scheduling_class.group) as place:
        tasks = [asyncio.create_task(answer.whole(place)) for answer in answers]
        try:
            return await asyncio.gather(*tasks)
        finally:
            await _cancel(tasks)


def _num_scores(whole: TextDelta) -> int:
    return len(whole.scores) + sum(len(piece.token_ids) for piece in whole.prompt_logprobs)


def streamed(
    places: ListPlaces, answers: Sequence[Answer], to_chunks: Sequence[ToChunks]
) -> AsyncGenerator[JsonObject, None]:
    """Returns the response chunks of all answers in the order of generation.

    Raises `QueueFull` before the first chunk if the answers are refused.
    """
    if len(answers) == 1:
        return answers[0].stream(to_chunks[0])
    return _merged(places, answers, to_chunks)


async def _merged(
    places: ListPlaces, answers: Sequence[Answer], to_chunks: Sequence[ToChunks]
) -> AsyncGenerator[JsonObject, None]:
    """Yields the chunks of all answers. The first failure closes all of them."""
    queue: asyncio.Queue[JsonObject | asyncio.Task[None]] = asyncio.Queue()

    async def read(stream: AsyncGenerator[JsonObject, None]) -> None:
        async with aclosing(stream):
            async for chunk in stream:
                queue.put_nowait(chunk)

    async with places.admitted(answers[0].scheduling_class.group) as place:
        streams = [
            answer.stream(convert, place)
            for answer, convert in zip(answers, to_chunks, strict=True)
        ]
        tasks = [asyncio.create_task(read(stream)) for stream in streams]
        for task in tasks:
            task.add_done_callback(queue.put_nowait)  # after the chunks of its stream
        try:
            num_running, num_items = len(tasks), 0
            while num_running:
                item = await queue.get()
                num_items += 1
                if num_items % MAX_CHUNKS_AT_ONCE == 0:
                    await asyncio.sleep(0)  # `queue.get` does not wait while there are items
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
