"""RunPod's SDK with its ways of losing jobs closed: take, stop, post and end.

The one module that reaches into the SDK's loop. The SDK's version is pinned, and a test holds what
is used of it. It keeps its loop, its heartbeat, its checks and its way from a handler to a result;
what it takes, hears of stops and posts goes through here:

    take    at a sensible pace; a job without `input` or with an id that runs already is no accident
    run     at once; the SDK looks at its queue ten times a second, and first tokens wait for it
    stop    reaches a job that still waits, and frees its place
    post    again until acknowledged; too large a result is said or kept on the volume
    end     SIGTERM, or `end`: what runs finishes or is refused in time, what the open poll still
            brings too
"""

import asyncio
import logging
import time
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from serve_app.errors import Draining, InternalError, ServeError
from serve_app.worker import post, results, stops
from serve_app.worker.drain import Drain
from serve_app.worker.handler import Handler
from serve_app.worker.results import Results
from serve_app.worker.take import Trouble, poll
from serve_app.worker.taken import Job, Taken

if TYPE_CHECKING:
    from aiohttp import ClientSession

log = logging.getLogger(__name__)

MAX_CHUNK_BYTES = 1_000_000
LOOK_S = 0.1
"""Seconds between two looks at how far the end is."""
GRACE_S = 5.0
"""Seconds that a result has to be posted in, also when the time for ending is over."""


class JobLoop:
    """Takes jobs for `handler`, `slots` at once, until SIGTERM or `end`; one loop per process."""

    def __init__(self, handler: Handler, slots: int, drain_s: float, results: Results) -> None:
        self._handler = handler
        self._slots = slots
        self._results = results
        self._drain = Drain(drain_s)
        self._taken = Taken()
        self._trouble = Trouble()
        self._is_taking = False
        self._answers: set[asyncio.Task[None]] = set()
        self._code = 0
        self._scaler: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self) -> int:
        """Returns when all jobs are answered: 0, or the code that was given to `end`."""
        import runpod
        from runpod.serverless.modules import rp_job, rp_scale

        build = rp_scale.JobScaler

        def wired(config: dict[str, Any]) -> Any:
            self._scaler = build(config)
            self._wire(self._scaler)
            return self._scaler

        rp_scale.JobScaler = wired
        rp_job.send_result, rp_job.stream_result = self._send, self._stream
        config = {
            "handler": self._handler.handle,
            "return_aggregate_stream": True,
            # A constant, as any change stops the taking until the worker is idle; and one more than
            # ever run, as the SDK sleeps a second where there is no free place. `_take` counts.
            "concurrency_modifier": lambda _: self._slots + 1,
        }
        runpod.serverless.start(config)
        return self._code

    def end(self, code: int) -> None:
        """Takes no more jobs; `run` returns `code` when all are answered. From the loop's thread.

        The poll that is open is waited for: the platform may just be handing out a job.
        """
        self._code = code
        self._scaler.kill_worker()

    def _wire(self, scaler: Any) -> None:
        shut_down = scaler.kill_worker

        def kill_worker() -> None:
            # The SDK calls it in a signal handler, which does not wake its event loop.
            if self._drain.begun.is_set():
                return
            shut_down()
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._begin_drain)

        scaler.kill_worker = kill_worker
        # Without the SDK's time limits: `poll` has its own, and `_listen` waits for the end.
        scaler.jobs_fetcher, scaler.jobs_fetcher_timeout = self._take, None
        scaler.stop_signals_fetcher, scaler.stop_signals_fetcher_timeout = self._listen, None

    def _begin_drain(self) -> None:
        if not self._drain.begun.is_set():
            self._drain.begin()
            num_open = len(self._taken.open)
            log.info("Told to stop: %d job(s) have %g s.", num_open, self._drain.limit_s)

    # The SDK calls what follows in its event loop.

    async def _take(self, session: "ClientSession", _: int) -> list[Job]:
        """Takes jobs, once there is a place, and starts them; none is left to the SDK's queue."""
        from runpod.serverless.modules import rp_job

        self._loop = asyncio.get_running_loop()
        while len(self._answers) >= self._slots:
            await asyncio.wait(self._answers, return_when=asyncio.FIRST_COMPLETED)
        if self._drain.begun.is_set() or not self._scaler.is_alive():
            return []
        self._is_taking = True
        try:
            url = rp_job._job_get_url(self._slots - len(self._answers))
            given = await poll(session, url, self._trouble, self._drain)
            for job in self._taken.accept(given):
                # What the SDK counts its free places by, and tells in its pings.
                self._scaler.job_progress.add(job)
                task = asyncio.create_task(self._answer(session, self._scaler.config, job))
                self._answers.add(task)
                task.add_done_callback(self._answers.discard)
            return []
        finally:
            self._is_taking = False

    async def _listen(self, session: "ClientSession") -> list[str]:
        """Stops what the platform wants stopped until the worker has ended; called once."""
        self._loop = asyncio.get_running_loop()
        hearing = asyncio.create_task(stops.hear(session, self._taken.stop))
        try:
            await self._drain.begun.wait()
            while self._is_taking or self._taken.open:
                self._hurry()
                await asyncio.sleep(LOOK_S)
        finally:
            hearing.cancel()
            await asyncio.wait({hearing})
        return []

    def _hurry(self) -> None:
        """What the end asks for at this moment."""
        for job in self._taken.open:
            since = job.answering_since
            if since is None:
                is_up = self._drain.is_cut
            else:
                is_up = self._drain.is_over and time.monotonic() - since > GRACE_S
            if is_up and job.task is not None:
                job.task.cancel()

    async def _answer(self, session: "ClientSession", config: dict[str, Any], job: Job) -> None:
        """Runs one job to its end; it is answered, or stopped by the platform."""
        from runpod.serverless.modules import rp_job

        try:
            error: ServeError | None = None
            if job.is_stopped:
                return
            if self._drain.is_cut:
                error = Draining("The worker is stopping; send the job again.")
            elif job.was_stopped_early:
                error = InternalError("The job was stopped before it began; send it again.")
            else:
                error = await self._run(rp_job.handle_job(session, config, job), job)
            if error is not None:
                job.answering()
                await self._run(self._refuse(session, job, error), job)
        finally:
            self._taken.close(job)
            self._scaler.job_progress.remove(job)

    async def _run(self, work: Coroutine[Any, Any, None], job: Job) -> ServeError | None:
        """Why the job has to be refused, where `work` ended without an answer."""
        job.task = asyncio.create_task(work)
        await asyncio.wait({job.task})
        if job.task.cancelled():
            if job.is_stopped:
                return None
            if job.answering_since is None:
                return Draining("The worker is stopping; send the job again.")
            log.error("job %r: its result could not be delivered in time.", job.id)
        elif (failure := job.task.exception()) is not None:
            log.error("job %r: %s", job.id, type(failure).__name__, exc_info=failure)
            if job.answering_since is None:
                return InternalError("An internal error occurred; send the job again.")
        return None

    async def _refuse(self, session: "ClientSession", job: Job, error: ServeError) -> None:
        for value in self._handler.refusal(job, error):
            if isinstance(value, dict) and "error" in value:
                await self._send(session, value, job)
            else:
                await self._stream(session, {"output": value}, job)

    async def _stream(self, session: "ClientSession", data: dict[str, Any], job: Job) -> None:
        """Stands for the SDK's `stream_result`."""
        from runpod.serverless.modules import rp_http

        if not job.streams:
            return
        body = results.as_json(data)
        # Too large to be a chunk: an answer that is no stream, which the result has anyway.
        job.streams = len(body) <= MAX_CHUNK_BYTES and await post.chunk(
            session, _url(rp_http.JOB_STREAM_URL, job, "false"), body, job.id, self._drain
        )

    async def _send(
        self, session: "ClientSession", data: dict[str, Any], job: Job, is_stream: bool = True
    ) -> None:
        """Stands for the SDK's `send_result`."""
        from runpod.serverless.modules import rp_http

        job.answering()
        url = _url(rp_http.JOB_DONE_URL, job, "true" if is_stream else "false")
        body = await self._results.body(job.id, data)
        outcome = await post.result(session, url, body, job.id, self._drain)
        if outcome == "too large":
            body = await self._results.instead(job.id, data, len(body))
            outcome = await post.result(session, url, body, job.id, self._drain)
        if outcome == "acknowledged" and body.startswith(b'{"output"'):
            self._taken.answered(job)


def _url(template: str, job: Job, is_stream: str) -> str:
    return template.replace("$ID", job.id) + f"&isStream={is_stream}"
