"""The one handler for all jobs: a job in, what RunPod's SDK posts for it out.

Every job is answered exactly once: with its output, or with `{"error": "<JSON string>"}`. Nothing
but a cancellation is ever raised, because the SDK would send the traceback to the client. Knows
jobs and the SDK's habits; not routes, Ray or tokens.
"""

import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from serve_app.api.metrics import status_text
from serve_app.api.routes import known
from serve_app.errors import (
    EngineDead,
    InternalError,
    MethodNotAllowed,
    ServeError,
    error_body,
    job_error,
)
from serve_app.loading.load_log import read_lines
from serve_app.node import phases
from serve_app.node.forward import Forward
from serve_app.protocol.sse import DONE, event
from serve_app.worker import progress
from serve_app.worker.boot import Boot
from serve_app.worker.delivery import Item, batches, merge_chunks, merge_text, postable
from serve_app.worker.job import JobRequest, new_request_id, parse

log = logging.getLogger(__name__)


class _Refused(Exception):
    """The model answered with an error body: it goes to the client as it is."""

    def __init__(self, body: dict[str, Any]) -> None:
        super().__init__()
        self.body = body


class Handler:
    """Answers jobs through `boot`'s model, which the first job that needs it starts."""

    def __init__(
        self,
        boot: Boot,
        *,
        tell: progress.Tell,
        load_log: str,
        progress_interval_s: float,
        max_body_bytes: int,
        model_name: str,
        outlook: Callable[[], Awaitable[dict[str, Any]]] | None = None,
    ) -> None:
        """`outlook` is what is said of the load besides how far it is."""
        self.boot = boot
        self._outlook = outlook
        self._tell = tell
        self._load_log = load_log
        self._interval_s = progress_interval_s
        self._max_body_bytes = max_body_bytes
        self._model_name = model_name

    async def handle(self, job: dict[str, Any]) -> AsyncGenerator[Any, None]:
        """What the SDK posts for `job`: chunks of a stream, or one value, or an error."""
        request_id = new_request_id()
        began = time.monotonic()
        request: JobRequest | None = None
        outcome = "cancelled"
        try:
            request = parse(job, request_id, self._max_body_bytes)
            async with contextlib.aclosing(self._answer(job, request)) as values:
                async for value in values:
                    yield postable(value)
            outcome = "answered"
        except Exception as error:
            # All is released by now: the SDK does not come back after an error.
            body = _body_of(error, request_id)
            outcome = body["error"]["status"]
            for value in _failure(request, body):
                yield postable(value)
        finally:
            seconds = time.monotonic() - began
            log.info("job %r, %s: %s after %.2f s", job.get("id"), request_id, outcome, seconds)

    def refusal(self, job: dict[str, Any], error: ServeError) -> list[Any]:
        """What is posted for `job` where something outside of it ends it with `error`."""
        request_id = new_request_id()
        try:
            request = parse(job, request_id, self._max_body_bytes)
        except ServeError:
            request = None
        log.info("job %r, %s: %s", job.get("id"), request_id, error.job_status)
        return [postable(value) for value in _failure(request, error_body(error, request_id))]

    async def _answer(self, job: dict[str, Any], request: JobRequest) -> AsyncGenerator[Any, None]:
        if request.call.path in ("/health", "/metrics") and self.boot.forward is None:
            if request.call.method != "GET":
                raise MethodNotAllowed(f"{request.call.path} takes GET.")
            is_health = request.call.path == "/health"
            yield self._health() if is_health else status_text(self.boot.status, self._model_name)
            return
        sent = False
        for is_last_try in (False, True):
            forward = await self._model(job)
            try:
                if not request.stream:
                    yield await self._body(job, forward, request)
                else:
                    async with contextlib.aclosing(_values(forward, request)) as values:
                        async for value in values:
                            sent = True
                            yield value
                if request.call.method == "POST":
                    self.boot.answered(forward)
                return
            except EngineDead:
                if sent or is_last_try:
                    raise
                log.warning("%s: the model went away; trying once more", request.call.request_id)
                await self.boot.confirmed(forward)

    async def _model(self, job: dict[str, Any]) -> Forward:
        if self.boot.forward is not None:
            return await self.boot.ready()

        async def tell() -> None:
            outlook = {} if self._outlook is None else await self._outlook()
            if self.boot.forward is None:  # else the answer itself is on its way
                await self._tell(job, {**self._health(), **outlook})

        return await progress.while_waiting(self.boot.ready(), tell, self._interval_s)

    async def _body(self, job: dict[str, Any], forward: Forward, request: JobRequest) -> Any:
        """The model's answer where it is no stream; tells the job how far a batch is."""
        news: list[dict[str, Any]] = []

        async def read() -> Any:
            async with contextlib.aclosing(forward(request.call)) as items:
                async for item in items:
                    match item:
                        case {"error": error}:
                            raise _refused(error)
                        case {"body": body}:
                            return body
                        case {"progress": update}:
                            news[:] = [update]
            raise InternalError("The answer ended before it was whole; send the request again.")

        async def tell() -> None:
            if news:
                await self._tell(job, news.pop())

        return await progress.while_waiting(read(), tell, self._interval_s)

    def _health(self) -> dict[str, Any]:
        """What `/health` says while no model can say it."""
        health: dict[str, Any] = {
            "status": self.boot.status,
            **phases.summary(read_lines(self._load_log)),
        }
        if self.boot.status == "failed" and self.boot.error is not None:
            # Not "error": the SDK fails a job whose output has a field of that name.
            health["reason"] = self.boot.error.message
        return health


async def _values(forward: Forward, request: JobRequest) -> AsyncGenerator[Any, None]:
    """The model's stream as the values to post, raising `_Refused` where it is an error."""
    answer = forward(request.call)
    items = _with_done(answer) if request.sse else answer
    values: list[Any]
    async with contextlib.aclosing(batches(items)) as parts:
        async for batch in parts:
            if request.sse:
                values = merge_text([text for item in batch if (text := _event(item))])
            else:
                values = merge_chunks([item["chunk"] for item in batch if "chunk" in item])
            for value in values:
                yield value
            for item in batch:
                if "error" in item:
                    raise _refused(item["error"])


async def _with_done(items: AsyncGenerator[Item, None]) -> AsyncGenerator[Item, None]:
    """`items` and the stream's last event, which so goes into one post with the last text."""
    async with contextlib.aclosing(items):
        async for item in items:
            yield item
            if "error" in item:
                return
    yield {"done": True}


def _event(item: Item) -> str:
    """What the gateway passes on of an item; nothing of most."""
    if "chunk" in item:
        return event(item["chunk"]).decode()
    return DONE.decode() if "done" in item else ""


def _refused(body: dict[str, Any]) -> Exception:
    """What the model's error is here: a dead engine in a living replica is a dead model."""
    error = body["error"]
    return EngineDead(error["message"]) if error["code"] == EngineDead.code else _Refused(body)


def _body_of(error: Exception, request_id: str) -> dict[str, Any]:
    if isinstance(error, _Refused):
        return error.body
    return error_body(known(error, request_id), request_id)


def _failure(request: JobRequest | None, body: dict[str, Any]) -> list[Any]:
    """A failed job's last words. A stream hears them first, as clients never see a job's error."""
    last = job_error(body)
    if request is None or not request.stream:
        return [last]
    if request.sse:
        return [event(postable(body)).decode(), last]  # an event takes no lone surrogate
    told = {name: body["error"][name] for name in ("status", "retry", "message")}
    return [{"token": "", "finished": True, "finish_reason": "error", **told}, last]
