"""The handlers of `/v1/messages` and `/v1/messages/count_tokens`."""

from typing import TYPE_CHECKING

from serve_app.protocol import values
from serve_app.protocol.call import Call, JsonReply, Reply, StreamReply
from serve_app.protocol.messages_api import response
from serve_app.protocol.messages_api.request import CountTokensRequest, MessagesRequest
from serve_app.protocol.tools import Tools

if TYPE_CHECKING:
    from serve_app.api.server import MixtralServer


async def create(server: "MixtralServer", call: Call) -> Reply:
    """Answers a `MessagesRequest`, streamed or not."""
    request = await values.read(MessagesRequest.read, call.body)
    metadata = server.metadata(request.model, call)
    tools = request.offered_tools()
    prompt_ids = await _prompt_ids(server, request, tools)
    (answer,) = await server.inputs.answers(
        call, request.sampling, prompt_ids, "messages", tools=tools, continues=request.continues
    )
    if not request.stream:
        whole = await answer.whole()
        return JsonReply(response.body(metadata, len(prompt_ids), whole))
    return StreamReply(answer.stream(response.MessageEvents(metadata, len(prompt_ids))))


async def count_tokens(server: "MixtralServer", call: Call) -> Reply:
    """Returns the number of tokens of a prompt, with the same count as `create`."""
    request = await values.read(CountTokensRequest.read, call.body)
    server.check_model(request.model)
    prompt_ids = await _prompt_ids(server, request, request.offered_tools())
    return JsonReply({"input_tokens": len(prompt_ids)})


async def _prompt_ids(
    server: "MixtralServer", request: CountTokensRequest, tools: Tools | None
) -> list[int]:
    return await server.inputs.chat_ids(
        request.conversation, continue_final_message=request.continues, tools=tools
    )
