"""The handler of `/v1/chat/completions`."""

from functools import partial
from typing import TYPE_CHECKING

from serve_app.api import choices
from serve_app.protocol import chat, values
from serve_app.protocol.call import Call, Reply, StreamReply
from serve_app.protocol.choices import StreamUsage

if TYPE_CHECKING:
    from serve_app.api.served_model import ServedModel


async def create(served: "ServedModel", call: Call) -> Reply:
    """Answers a `ChatRequest`, streamed or not."""
    request = await values.read(chat.ChatRequest.read, call.body)
    metadata = served.metadata(request.model, call)
    names = served.tokenizer
    tools = request.offered_tools() if request.tools or request.tool_choice else None
    prompt_ids = await served.inputs.chat_ids(
        request.messages,
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
        tools=tools,
    )
    answers = await served.inputs.answers(
        call,
        request,
        prompt_ids,
        "messages",
        count=request.num_answers,
        num_logprobs=request.num_logprobs,
        tools=tools,
        continues=request.continue_final_message,
        num_prompt_logprobs=request.prompt_logprobs,
    )
    if request.logprobs or request.prompt_logprobs is not None:
        choices.check_size(answers, "top_logprobs" if request.logprobs else "prompt_logprobs")
    if not request.stream:
        to_body = partial(chat.body, request, metadata, len(prompt_ids), names)
        return await choices.reply(served.list_places, answers, to_body)
    totals = StreamUsage(len(prompt_ids), len(answers))
    chunks = [
        chat.ChatChunks(request, metadata, len(prompt_ids), names, totals, index)
        for index in range(len(answers))
    ]
    return StreamReply(choices.streamed(served.list_places, answers, chunks))
