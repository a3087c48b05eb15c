"""The handler of `/v1/completions`, for one prompt or several side by side."""

import asyncio
from functools import partial
from typing import TYPE_CHECKING

from serve_app.api import choices
from serve_app.api.answer import Answer
from serve_app.api.input_processor import InputProcessor
from serve_app.protocol import values
from serve_app.protocol.call import Call, Reply, StreamReply
from serve_app.protocol.completions import (
    DEFAULT_MAX_TOKENS,
    CompletionRequest,
    CompletionResponse,
    Prompt,
)
from serve_app.protocol.detokenizer import Detokenizer
from serve_app.protocol.echo import Echo
from serve_app.protocol.scores import PromptText

if TYPE_CHECKING:
    from serve_app.api.served_model import ServedModel


async def create(served: "ServedModel", call: Call) -> Reply:
    """Answers a `CompletionRequest`, streamed or not."""
    request = await values.read(CompletionRequest.read, call.body)
    metadata = served.metadata(request.model, call)
    inputs = served.inputs
    answers, echoes, num_prompt_tokens = [], [], []
    for prompt in request.prompts:
        await asyncio.sleep(0)  # other requests run between two prompts
        answers += await _answers(inputs, call, request, prompt)
        prompt_ids = answers[-1].prompt_ids
        num_prompt_tokens.append(len(prompt_ids))
        text = await _text(inputs, prompt) if request.echo else ""
        echoes += [_echo(inputs, request, text, prompt_ids) for _ in range(request.n)]
    choices.check_size(
        answers, "logprobs" if request.prompt_logprobs is None else "prompt_logprobs"
    )
    response = CompletionResponse(request, metadata, num_prompt_tokens, echoes, served.tokenizer)
    if request.stream:
        chunks = [partial(response.chunks, index) for index in range(len(answers))]
        return StreamReply(choices.streamed(served.list_places, answers, chunks))
    return await choices.reply(served.list_places, answers, response.body)


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
        num_prompt_logprobs=request.num_prompt_logprobs,
        default_max_tokens=DEFAULT_MAX_TOKENS,
        continues=True,
    )


def _echo(
    inputs: InputProcessor, request: CompletionRequest, text: str, prompt_ids: list[int]
) -> Echo:
    if not request.echo or request.logprobs is None:
        return Echo(text)
    detokenizer = Detokenizer(inputs.tokenizer.backend)
    return Echo(text, PromptText(prompt_ids[0], detokenizer))


async def _text(inputs: InputProcessor, prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else await inputs.text(prompt, "prompt")
