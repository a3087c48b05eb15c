"""The handlers of `/v1/messages` and `/v1/messages/count_tokens`."""

from typing import TYPE_CHECKING

from serve_app.protocol import values
from serve_app.protocol.call import Call, JsonReply, Reply, StreamReply
from serve_app.protocol.messages_api import response
from serve_app.protocol.messages_api.request import CountTokensRequest, MessagesRequest
from serve_app.protocol.tools import Tools

if TYPE_CHECKING:
    from serve_app.api.served_model import ServedModel


async def create(served: "ServedModel", call: Call) -> Reply:
    """Answers a `MessagesRequest`, streamed or not."""
    request = await values.read(MessagesRequest.read, call.body)
    metadata = served.metadata(request.model, call)
    tools = request.offered_tools()
    prompt_ids = await _prompt_ids(served, request, tools)
    (answer,) = await served.inputs.answers(
        call, request.sampling, prompt_ids, "messages", tools=tools, continues=request.continues
    )
    if not request.stream:
        whole = await answer.whole()
        return JsonReply(response.body(metadata, len(prompt_ids), whole))
    return StreamReply(answer.stream(response.MessageEvents(metadata, len(prompt_ids))))


async def count_tokens(served: "ServedModel", call: Call) -> Reply:
    """Returns the number of tokens of a prompt, with the same count as `create`."""
    request = await values.read(CountTokensRequest.read, call.body)
    served.check_model(request.model)
    prompt_ids = await _prompt_ids(served, request, request.offered_tools())
    return JsonReply({"input_tokens": len(prompt_ids)})


async def _prompt_ids(
    served: "ServedModel", request: CountTokensRequest, tools: Tools | None
) -> list[int]:
    return await served.inputs.chat_ids(
        request.conversation, continue_final_message=request.continues, tools=tools
    )
