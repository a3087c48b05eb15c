"""The handler of `/v1/completions`, for one prompt or several side by side."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any

from serve_app.api.answer import Answer
from serve_app.api.input_processor import InputProcessor
from serve_app.api.list_places import ItemPlace, ListPlaces
from serve_app.errors import InvalidRequest
from serve_app.protocol import values
from serve_app.protocol.call import Call, JsonObject, JsonReply, Reply, StreamReply
from serve_app.protocol.completions import (
    DEFAULT_MAX_TOKENS,
    CompletionRequest,
    CompletionResponse,
    Prompt,
)
from serve_app.protocol.text import TextDelta

MAX_LOGPROBS = 1_000_000
"""Log probabilities in one answer: more than the 20 for each token of Mixtral's whole context."""
MAX_SCORES_ON_LOOP = 200
"""Tokens with log probabilities; naming those of more delays other requests noticeably."""

if TYPE_CHECKING:
    from serve_app.api.server import MixtralServer


async def create(server: "MixtralServer", call: Call) -> Reply:
    """Answers a `CompletionRequest`, streamed or not."""
    request = await values.read(CompletionRequest.read, call.body)
    metadata = server.metadata(request.model, call)
    inputs = server.inputs
    answers, echoes = [], []
    for prompt in request.prompts:
        await asyncio.sleep(0)  # other requests run between two prompts
        answers.append(await _answer(inputs, call, request, prompt))
        echoes.append(await _text(inputs, prompt) if request.echo else "")
    _check_size(answers, request.logprobs or 0)
    num_prompt_tokens = [len(answer.prompt_ids) for answer in answers]
    response = CompletionResponse(request, metadata, num_prompt_tokens, echoes, server.tokenizer)
    if len(answers) == 1:
        if request.stream:
            return StreamReply(answers[0].stream(partial(response.chunks, 0)))
        return await _reply(response, [await answers[0].whole()])
    if request.stream:
        return StreamReply(_streamed(server.list_places, answers, response))
    async with server.list_places.admitted() as place:
        return await _reply(response, await _wholes(answers, place))


def _check_size(answers: Sequence[Answer], num_logprobs: int) -> None:
    """Raises `InvalidRequest` where the log probabilities would take too much memory."""
    total = num_logprobs * sum(answer.params.max_tokens for answer in answers)
    if total > MAX_LOGPROBS:
        raise InvalidRequest(
            f"Prompts x `max_tokens` x `logprobs` is {total:,}; {MAX_LOGPROBS:,} are allowed. Send "
            "fewer prompts, or ask for fewer tokens or log probabilities.",
            param="logprobs",
        )


async def _answer(
    inputs: InputProcessor, call: Call, request: CompletionRequest, prompt: Prompt
) -> Answer:
    prompt_ids = await inputs.text_ids(prompt) if isinstance(prompt, str) else prompt
    return await inputs.answer(
        call,
        request,
        prompt_ids,
        "prompt",
        num_logprobs=request.logprobs,
        default_max_tokens=DEFAULT_MAX_TOKENS,
        continues=True,
    )


async def _reply(response: CompletionResponse, wholes: list[TextDelta]) -> JsonReply:
    """The whole response; with many log probabilities it is made in a thread."""
    if sum(len(whole.scores) for whole in wholes) > MAX_SCORES_ON_LOOP:
        return JsonReply(await asyncio.to_thread(response.body, wholes))
    return JsonReply(response.body(wholes))


async def _text(inputs: InputProcessor, prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else await inputs.text(prompt, "prompt")


async def _wholes(answers: Sequence[Answer], place: ItemPlace) -> list[TextDelta]:
    """Waits for all answers; the first failure cancels the others."""
    tasks = [asyncio.create_task(answer.whole(place)) for answer in answers]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _cancel(tasks)


async def _streamed(
    places: ListPlaces, answers: Sequence[Answer], response: CompletionResponse
) -> AsyncGenerator[JsonObject, None]:
    """The chunks of all answers; raises `QueueFull` first where the list is refused."""
    async with places.admitted() as place:
        streams = [
            answer.stream(partial(response.chunks, index), place)
            for index, answer in enumerate(answers)
        ]
        async with aclosing(_merged(streams)) as chunks:
            async for chunk in chunks:
                yield chunk


async def _merged(
    streams: Sequence[AsyncGenerator[JsonObject, None]],
) -> AsyncGenerator[JsonObject, None]:
    """The chunks of all streams as they come; the first failure closes all streams."""
    queue: asyncio.Queue[JsonObject | asyncio.Task[None]] = asyncio.Queue()

    async def read(stream: AsyncGenerator[JsonObject, None]) -> None:
        async with aclosing(stream):
            async for chunk in stream:
                queue.put_nowait(chunk)

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
