"""The handler of `/v1/chat/completions`."""

from typing import TYPE_CHECKING

from serve_app.protocol import chat, values
from serve_app.protocol.call import Call, JsonReply, Reply, StreamReply

if TYPE_CHECKING:
    from serve_app.api.server import MixtralServer


async def create(server: "MixtralServer", call: Call) -> Reply:
    """Answers a `ChatRequest`, streamed or not."""
    request = await values.read(chat.ChatRequest.read, call.body)
    metadata = server.metadata(request.model, call)
    names = server.tokenizer
    prompt_ids = await server.inputs.chat_ids(request.messages)
    num_logprobs = request.top_logprobs if request.logprobs else None
    answer = await server.inputs.answer(
        call, request, prompt_ids, "messages", num_logprobs=num_logprobs
    )
    if not request.stream:
        whole = await answer.whole()
        return JsonReply(chat.body(request, metadata, len(prompt_ids), whole, names))
    chunks = answer.stream(chat.ChatChunks(request, metadata, len(prompt_ids), names))
    return StreamReply(chunks)
