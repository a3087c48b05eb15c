"""Answers many requests in this process, for `mixtral-serve batch`.

Each request uses the code of a RunPod job, without HTTP and Ray.
"""

import asyncio
import uuid
from collections.abc import Callable, Iterator
from contextlib import aclosing
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from serve_app.api import routes
from serve_app.config.sections import EngineSettings
from serve_app.error_body import error_body
from serve_app.errors import InvalidRequest
from serve_app.protocol import batch
from serve_app.protocol.batch import BatchRequest, BatchResponse, BatchResult

if TYPE_CHECKING:
    from serve_app.api.server import MixtralServer

URLS = tuple(route.path for route in routes.ROUTES if route.generates)
"""Paths that a request of a batch may use."""


def num_under_way(engine: EngineSettings) -> int:
    """Returns the number of concurrent requests: a few more than the engine runs, so that it never
    waits."""
    return engine.max_num_seqs + engine.max_waiting // 4


async def answer_all(
    server: "MixtralServer",
    requests: Iterator[BatchRequest],
    write: Callable[[BatchResult], None],
) -> None:
    """Answers all `requests` and calls `write` with each result as soon as it is ready.

    Errors of requests are results. Raises `EngineDead` and the errors of `write`, after cancelling
    the running requests; those have no result.
    """

    async def answer_in_turn() -> None:
        for request in requests:
            write(await answer(server, request))

    num_tasks = num_under_way(server.settings.engine)
    tasks = [asyncio.create_task(answer_in_turn()) for _ in range(num_tasks)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def answer(server: "MixtralServer", request: BatchRequest) -> BatchResult:
    """Returns the result of one request. Raises `EngineDead`."""
    request_id = uuid.uuid4().hex
    status, body = await _response(server, request, request_id)
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        server.check_health()
    response: BatchResponse = {"status_code": status, "request_id": request_id, "body": body}
    return batch.response_result(request.custom_id, response)


async def _response(
    server: "MixtralServer", request: BatchRequest, request_id: str
) -> tuple[int, Any]:
    """Returns the HTTP status and the body."""
    if request.body.get("stream"):
        error = InvalidRequest("A batch has whole answers; leave out `stream`.", param="stream")
        return error.http_status, error_body(error, request_id, request.url)
    async with aclosing(server.call("POST", request.url, request.body, request_id)) as items:
        async for item in items:
            if "body" in item:
                return item["status"], item["body"]
            if "error" in item:
                return item["status"], item["error"]
    raise AssertionError("a call ended without a body or an error")


def num_tokens(result: BatchResult) -> int:
    """Returns the number of generated tokens of one result, from its `usage`."""
    response = result["response"]
    body = response["body"] if response is not None else None
    match body:
        case {"usage": {"completion_tokens": int(count)} | {"output_tokens": int(count)}}:
            return count
    return 0
