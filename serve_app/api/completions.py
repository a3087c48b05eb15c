"""The handler of `/v1/completions`, for one prompt or several side by side."""

import asyncio
from functools import partial
from typing import TYPE_CHECKING

from serve_app.api import choices
from serve_app.api.answer import Answer
from serve_app.api.input_processor import InputProcessor
from serve_app.protocol import values
from serve_app.protocol.call import Call, JsonReply, Reply, StreamReply
from serve_app.protocol.completions import (
    DEFAULT_MAX_TOKENS,
    CompletionRequest,
    CompletionResponse,
    Prompt,
)
from serve_app.protocol.text import TextDelta

MAX_SCORES_ON_LOOP = 200
"""Tokens with log probabilities; naming those of more delays other requests noticeably."""

if TYPE_CHECKING:
    from serve_app.api.server import MixtralServer


async def create(server: "MixtralServer", call: Call) -> Reply:
    """Answers a `CompletionRequest`, streamed or not."""
    request = await values.read(CompletionRequest.read, call.body)
    metadata = server.metadata(request.model, call)
    inputs = server.inputs
    answers, echoes, num_prompt_tokens = [], [], []
    for prompt in request.prompts:
        await asyncio.sleep(0)  # other requests run between two prompts
        answers += await _answers(inputs, call, request, prompt)
        num_prompt_tokens.append(len(answers[-1].prompt_ids))
        echoes.append(await _text(inputs, prompt) if request.echo else "")
    choices.check_size(answers, "logprobs")
    response = CompletionResponse(request, metadata, num_prompt_tokens, echoes, server.tokenizer)
    if request.stream:
        chunks = [partial(response.chunks, index) for index in range(len(answers))]
        return StreamReply(choices.streamed(server.list_places, answers, chunks))
    return await _reply(response, await choices.wholes(server.list_places, answers))


async def _answers(
    inputs: InputProcessor, call: Call, request: CompletionRequest, prompt: Prompt
) -> list[Answer]:
    prompt_ids = await inputs.text_ids(prompt) if isinstance(prompt, str) else prompt
    return await inputs.answers(
        call,
        request,
        prompt_ids,
        "prompt",
        count=request.num_answers,
        num_logprobs=request.num_logprobs,
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
