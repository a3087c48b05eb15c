"""The handler of `/v1/responses`."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

from serve_app.api import choices
from serve_app.errors import as_serve_error
from serve_app.protocol import values
from serve_app.protocol.call import Call, JsonObject, Reply, StreamReply
from serve_app.protocol.responses_api import response
from serve_app.protocol.responses_api.events import ResponseEvents
from serve_app.protocol.responses_api.request import ResponsesRequest

if TYPE_CHECKING:
    from serve_app.api.answer import Answer
    from serve_app.api.served_model import ServedModel

MAX_STREAMED_LOGPROBS = 200_000
"""Maximum number of log probabilities in one streamed answer. The last events repeat all of them,
and encoding more would delay other requests."""


async def create(served: "ServedModel", call: Call) -> Reply:
    """Answers a `ResponsesRequest`, streamed or not."""
    request = await values.read(ResponsesRequest.read, call.body)
    metadata = served.metadata(request.model, call)
    tools = request.offered_tools()
    prompt_ids = await served.inputs.chat_ids(request.conversation, "input", tools=tools)
    answers = await served.inputs.answers(
        call,
        request.sampling,
        prompt_ids,
        "input",
        num_logprobs=request.num_logprobs,
        tools=tools,
    )
    arguments = request, metadata, len(prompt_ids), served.tokenizer
    if request.num_logprobs is not None:
        limit = MAX_STREAMED_LOGPROBS if request.stream else choices.MAX_LOGPROBS
        choices.check_size(answers, "top_logprobs", limit)
    if not request.stream:
        to_body = lambda wholes: response.body(*arguments, wholes[0])  # noqa: E731
        return await choices.reply(served.list_places, answers, to_body)
    events = ResponseEvents(*arguments)
    return StreamReply(_streamed(answers[0], events))


async def _streamed(answer: "Answer", events: ResponseEvents) -> AsyncGenerator[JsonObject, None]:
    """Yields the events of `answer`. A failure after the first event adds `response.failed`."""
    async with aclosing(answer.stream(events)) as chunks:
        try:
            async for chunk in chunks:
                yield chunk
        except Exception as error:
            if events.has_begun:
                yield events.failed(as_serve_error(error))
            raise
