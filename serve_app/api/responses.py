"""The handler of `/v1/responses`."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

from serve_app.errors import as_serve_error
from serve_app.protocol import values
from serve_app.protocol.call import Call, JsonObject, JsonReply, Reply, StreamReply
from serve_app.protocol.responses_api import response
from serve_app.protocol.responses_api.events import ResponseEvents
from serve_app.protocol.responses_api.request import ResponsesRequest

if TYPE_CHECKING:
    from serve_app.api.answer import Answer
    from serve_app.api.server import MixtralServer


async def create(server: "MixtralServer", call: Call) -> Reply:
    """Answers a `ResponsesRequest`, streamed or not."""
    request = await values.read(ResponsesRequest.read, call.body)
    metadata = server.metadata(request.model, call)
    tools = request.offered_tools()
    prompt_ids = await server.inputs.chat_ids(request.conversation, "input", tools=tools)
    (answer,) = await server.inputs.answers(
        call, request.sampling, prompt_ids, "input", tools=tools
    )
    if not request.stream:
        whole = await answer.whole()
        return JsonReply(response.body(request, metadata, len(prompt_ids), whole))
    return StreamReply(_streamed(answer, ResponseEvents(request, metadata, len(prompt_ids))))


async def _streamed(answer: "Answer", events: ResponseEvents) -> AsyncGenerator[JsonObject, None]:
    """The events of `answer`; where it fails after the first, the last one is `response.failed`."""
    async with aclosing(answer.stream(events)) as chunks:
        try:
            async for chunk in chunks:
                yield chunk
        except Exception as error:
            if events.has_begun:
                yield events.failed(as_serve_error(error))
            raise
