"""Handler: reads a job's input, calls the model, and posts the output or the error.

Every job gets exactly one result. `Handler` raises only `CancelledError`, which means that the job
was stopped.
"""

import contextlib
import json
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from serve_app.api import routes
from serve_app.api.metrics.metrics import status_text
from serve_app.error_body import ErrorBody, error_body
from serve_app.errors import EngineDead, InternalError, ServeError, handle_error
from serve_app.loading.phases import read_events
from serve_app.node import phases
from serve_app.node.client import Forward
from serve_app.protocol.call import Call, ErrorItem, JsonObject, Progress
from serve_app.protocol.sse import event
from serve_app.worker import job_log, progress
from serve_app.worker.buffer import ItemBuffer
from serve_app.worker.job import JobRequest, parse
from serve_app.worker.output import Output, merged_chunks, merged_events
from serve_app.worker.posts import Posts
from serve_app.worker.result import Result, encode
from serve_app.worker.supervisor import StartupSupervisor

log = logging.getLogger(__name__)


class _Refused(Exception):
    """The model's answer is an error, which the client gets unchanged."""

    def __init__(self, item: ErrorItem) -> None:
        super().__init__()
        self.body = item["error"]


class Handler:
    """Answers jobs with the model of `supervisor`."""

    def __init__(
        self,
        supervisor: StartupSupervisor,
        *,
        load_log: str,
        progress_interval_s: float,
        max_body_bytes: int,
        model_name: str,
        outlook: Callable[[], Awaitable[dict[str, Any]]] | None = None,
    ) -> None:
        """`outlook` returns fields for progress updates of the load, such as a forecast."""
        self.supervisor = supervisor
        self._outlook = outlook
        self._load_log = load_log
        self._interval_s = progress_interval_s
        self._max_body_bytes = max_body_bytes
        self._model_name = model_name

    async def answer(self, job: dict[str, Any], posts: Posts) -> None:
        """Runs `job`, the platform's object. Posts its output while it is generated, then its
        result."""
        job_id, request_id = job.get("id"), posts.request_id
        began = time.monotonic()
        request: JobRequest | None = None
        job_log.started(job_id, request_id)
        try:
            request = parse(job, request_id, self._max_body_bytes)
            result = await self._answer(request, posts)
            job_log.completed(job_id, time.monotonic() - began)
        except Exception as error:
            if isinstance(error, _Refused):
                body = error.body
            else:
                path = request.call.path if request is not None else ""
                body = error_body(handle_error(error, request_id), request_id, path)
            job_log.failed(job_id, time.monotonic() - began, body)
            result = await _failed(request, body, posts)
        await posts.result(result)

    async def refuse(self, job: dict[str, Any], posts: Posts, error: ServeError) -> None:
        """Ends `job` with `error`, for which the worker is responsible, not the job. Its stream may
        have begun."""
        request_id = posts.request_id
        request: JobRequest | None = None
        with contextlib.suppress(ServeError):
            request = parse(job, request_id, self._max_body_bytes)
        path = request.call.path if request is not None else ""
        body = error_body(error, request_id, path)
        job_log.failed(job.get("id"), 0.0, body)
        await posts.result(await _failed(request, body, posts))

    async def _answer(self, request: JobRequest, posts: Posts) -> Result:
        """Returns the result of the job. A job that has no output yet is tried a second time."""
        call, output = request.call, Output(posts, is_list=request.is_list)
        if self.supervisor.client is None:
            route = routes.find(call.path)
            if route is not None and route.is_open_before_load:
                await output.add(self._status(call))
                return output.result()
        for is_last_try in (False, True):
            is_ready = self.supervisor.client is not None
            client = await (self.supervisor.ready() if is_ready else self._loaded(posts))
            try:
                if request.stream:
                    await _stream(client, request, output, posts)
                else:
                    await output.add(await self._body(client, call, posts))
                if call.method == "POST":
                    self.supervisor.answered(client)
                break
            except EngineDead:
                if is_last_try or not output.is_empty:
                    raise
                log.warning("%s: the model has died; the job is run once more.", call.request_id)
                await self.supervisor.wait_for_death(client)
        return output.result()

    async def _loaded(self, posts: Posts) -> Forward:
        """Waits for the model, and posts the progress of its load. Returns its client."""

        async def update() -> None:
            outlook = {} if self._outlook is None else await self._outlook()
            if self.supervisor.client is None:
                await posts.progress({**self._health(), **outlook})

        return await progress.while_waiting(self.supervisor.ready(), update, self._interval_s)

    async def _body(self, client: Forward, call: Call, posts: Posts) -> Any:
        """Returns the model's answer if it is not a stream. Posts the progress of a list of
        prompts.

        Raises the error that the model returns instead.
        """
        latest: list[Progress] = []

        async def read() -> Any:
            body: Any = None
            # One task reads the items and closes them: a generator cannot be closed while another
            # task waits for its next item.
            async with contextlib.aclosing(client(call)) as items:
                async for item in items:
                    if "error" in item:
                        raise _failure(item)
                    if "body" in item:
                        body = item["body"]
                    elif "progress" in item:
                        latest[:] = [item["progress"]]
            if body is None:
                raise InternalError(
                    "The answer ended before it was complete. Send the request again."
                )
            return body

        async def update() -> None:
            if latest:
                await posts.progress({**latest.pop()})

        return await progress.while_waiting(read(), update, self._interval_s)

    def _status(self, call: Call) -> Any:
        """Returns the answer to `/health` or `/metrics` while no model is loaded."""
        routes.match(call.method, call.path)
        if call.path == "/health":
            return self._health()
        return status_text(self.supervisor.status, self._model_name)

    def _health(self) -> dict[str, Any]:
        """Returns `{"status", "load", ...}` while no model is ready, and the reason if the last
        start failed."""
        supervisor = self.supervisor
        health = {"status": supervisor.status, **phases.summary(read_events(self._load_log))}
        if supervisor.status == "failed" and supervisor.error is not None:
            # The name is not "error", because RunPod's clients treat an output with that field as
            # a failed job.
            health["reason"] = supervisor.error.message
        return health


async def _stream(client: Forward, request: JobRequest, output: Output, posts: Posts) -> None:
    """Adds the model's stream to `output`. Raises the error that ends it early, after all earlier
    items.

    The end event of an event stream is posted together with the last text if both are ready.
    """
    route = routes.find(request.call.path)
    end = route.stream_end if route is not None and request.sse else b""
    has_end = not end
    async with ItemBuffer(client(request.call)) as buffer:
        while not buffer.is_over:
            batch = await buffer.take()
            chunks = [item["chunk"] for item in batch if "chunk" in item]
            posts.last_chunk = chunks[-1] if chunks else posts.last_chunk
            errors = [item for item in batch if "error" in item]
            values: list[Any]
            if request.sse:
                has_end = not end or (buffer.is_over and not errors)
                values = merged_events(chunks, end if has_end else b"")
            else:
                values = merged_chunks(chunks)
            for value in values:
                await output.add(value)
            for error in errors:
                raise _failure(error)
    if not has_end:  # the stream ended while its last events were being posted
        await output.add(end.decode())


def _failure(item: ErrorItem) -> Exception:
    """Returns the exception for an error item. If the engine is dead, the model counts as dead even
    if the replica is alive."""
    error = item["error"]["error"]
    return EngineDead(error["message"]) if error["code"] == EngineDead.code else _Refused(item)


async def _failed(request: JobRequest | None, body: ErrorBody, posts: Posts) -> Result:
    """Returns the result of a job that fails with the error body `body`.

    A stream gets the error as its last chunk, because RunPod's clients do not show a job's error.
    The gateway's stream gets it as the API's own event.
    """
    if request is not None and request.stream:
        await posts.chunk(encode(_error_chunk(request, body, posts.last_chunk)))
    is_list = request is not None and request.is_list
    return Result.of_error(body, is_list=is_list)


def _error_chunk(request: JobRequest, body: ErrorBody, last: JsonObject) -> Any:
    """Returns the last chunk of a stream that fails after the response chunk `last`."""
    if not request.sse:
        fields = {name: body["error"][name] for name in ("status", "retry", "message")}
        return {"token": "", "finished": True, "finish_reason": "error", **fields}
    route = routes.find(request.call.path)
    error_event = body if route is None else route.error_event(body, last)
    return event(json.loads(encode(error_event))).decode()  # an event refuses lone surrogates
