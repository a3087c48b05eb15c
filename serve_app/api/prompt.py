"""The handler of `/prompt`, for one prompt or a list of them."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from serve_app.api.answer import Answer
from serve_app.api.list_places import ItemPlace
from serve_app.error_body import error_body
from serve_app.errors import EngineDead
from serve_app.protocol import prompt, values
from serve_app.protocol.call import (
    BatchReply,
    BodyItem,
    Call,
    JsonObject,
    JsonReply,
    ProgressItem,
    Reply,
    StreamReply,
)

if TYPE_CHECKING:
    from serve_app.api.served_model import ServedModel


async def create(served: "ServedModel", call: Call) -> Reply:
    """Answers a `PromptRequest`, streamed or not, or a `Batch`."""
    max_prompts = served.settings.api.max_prompts
    request = await values.read(partial(prompt.read, max_prompts=max_prompts), call.body)
    if isinstance(request, prompt.Batch):
        return BatchReply(_batch(served, call, request))
    metadata = served.metadata(request.model, call)
    answer = await _answer(served, call, request)
    num_prompt_tokens = len(answer.prompt_ids)
    if not request.stream:
        return JsonReply(prompt.body(metadata, num_prompt_tokens, await answer.whole()))
    chunks = answer.stream(partial(prompt.chunks, metadata, num_prompt_tokens))
    return StreamReply(chunks)


async def _answer(served: "ServedModel", call: Call, request: prompt.PromptRequest) -> Answer:
    field = "messages" if request.prompt is None else "prompt"
    prompt_ids = await served.inputs.chat_ids(request.conversation, field)
    (answer,) = await served.inputs.answers(
        call, request, prompt_ids, field, default_max_tokens=prompt.DEFAULT_MAX_TOKENS
    )
    return answer


async def _batch(
    served: "ServedModel", call: Call, batch: prompt.Batch
) -> AsyncGenerator[ProgressItem | BodyItem, None]:
    """Answers the items concurrently. Yields progress while items end, then all results in
    order."""
    total = len(batch.items)
    async with served.list_places.admitted(call.group) as place:
        tasks = [
            asyncio.create_task(_result(served, call, batch, item, place)) for item in batch.items
        ]
        try:
            for num_done, finished in enumerate(asyncio.as_completed(tasks), start=1):
                await finished
                yield {"progress": prompt.progress(num_done, total)}
            results = [task.result() for task in tasks]
            yield {"status": 200, "body": {"results": results, "total_processed": total}}
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _result(
    served: "ServedModel", call: Call, batch: prompt.Batch, item: Any, place: ItemPlace
) -> JsonObject:
    """Returns the result of one item. A failed item's result is its error body.

    Raises `EngineDead`, which fails the whole list, so that a job of it is run once more.
    """
    async with place():
        await asyncio.sleep(0)  # other requests run between two items
        try:
            request = await values.read(batch.read, item)
            metadata = served.metadata(request.model, call)
            answer = await _answer(served, call, request)
            whole = await answer.whole(nullcontext)  # `place()` above holds the item's place
            body = prompt.body(metadata, len(answer.prompt_ids), whole)
            return {name: body[name] for name in ("text", "finish_reason", "usage")}
        except EngineDead:
            raise  # no other item can be answered either
        except Exception as error:
            return {**error_body(served.failure(error, call.request_id), call.request_id)}
