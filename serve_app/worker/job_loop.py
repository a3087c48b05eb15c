"""Takes jobs and runs each in a task until its result is posted; drains at the end.

take    a poll requests as many jobs as there are free slots; a job starts at once and uses one
        slot for each prompt of its list
stop    a stopped job is cancelled, even while it waits, and its slots become free
drain   after SIGTERM or `end`, running jobs finish or are refused in time; jobs that the open poll
        still returns are treated alike
"""

import asyncio
import logging
import time
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from serve_app.errors import Draining, InternalError, ServeError
from serve_app.worker import sdk
from serve_app.worker.drain import Drain
from serve_app.worker.handler import Handler
from serve_app.worker.in_flight import InFlightJobs, Job
from serve_app.worker.job_log import running_job
from serve_app.worker.poll import poll_for_jobs, poll_for_stops
from serve_app.worker.posts import JobPosts
from serve_app.worker.result import LargeResults
from serve_app.worker.sdk import SdkLoop

if TYPE_CHECKING:
    from aiohttp import ClientSession

log = logging.getLogger(__name__)

DRAIN_CHECK_S = 0.1
"""Seconds between two checks for jobs that are out of time, while draining."""
GRACE_S = 5.0
"""Minimum seconds for posting a result, even if the drain is over."""


class JobLoop:
    """Takes jobs for `handler`, about `slots` prompts at a time, until SIGTERM or `end`.

    There is one loop per process.
    """

    def __init__(
        self, handler: Handler, slots: int, drain_s: float, large_results: LargeResults
    ) -> None:
        self._handler = handler
        self._slots = slots
        self._large_results = large_results
        self._drain = Drain(drain_s)
        self._jobs = InFlightJobs()
        self._poll = poll_for_jobs()
        self._is_polling = False
        self._has_polled = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._code = 0
        self._sdk = SdkLoop(slots, self._take, self._stop_jobs, self._begin_drain)

    def run(self) -> int:
        """Blocks until all jobs are answered. Returns 0, or the code passed to `end`."""
        self._sdk.run()
        return self._code

    def end(self, code: int) -> None:
        """Stops taking jobs; `run` returns `code` when all are answered. Call it in the loop's
        thread.

        The open poll is awaited, because it may return jobs.
        """
        self._code = code
        self._sdk.end()

    def _begin_drain(self) -> None:
        if not self._drain.begun.is_set():
            self._drain.begin()
            num_open = len(self._jobs.open)
            log.info(
                "Stopping: %d running job(s) have %g s to finish.", num_open, self._drain.limit_s
            )

    async def _take(self, session: "ClientSession") -> None:
        """Waits for a free slot, polls once, and starts a task for each job."""
        while not (num_jobs := self._jobs.may_take(self._slots)):
            await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        if self._sdk.is_ending:
            return
        if not self._has_polled:
            log.info("Waiting for jobs.")
        self._is_polling = self._has_polled = True
        try:
            url = sdk.take_url(num_jobs)
            payloads, pause_s = await self._poll.get(session, url)
            self._start(session, payloads)
        finally:
            self._is_polling = False
        if not payloads:
            await self._drain.sleep(pause_s)

    def _start(self, session: "ClientSession", payloads: list[Any]) -> None:
        """Starts a task for each job of `payloads` that is to run."""
        for job in self._jobs.accept(payloads):
            self._sdk.started(job.id)
            task = asyncio.create_task(self._run(session, job))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _stop_jobs(self, session: "ClientSession") -> None:
        """Stops the jobs that the platform names and, while draining, jobs that are late."""
        polling = asyncio.create_task(self._poll_stops(session))
        try:
            await self._drain.begun.wait()
            while self._is_polling or self._jobs.open:
                self._cancel_late_jobs()
                await asyncio.sleep(DRAIN_CHECK_S)
        finally:
            polling.cancel()
            await asyncio.wait({polling})

    async def _poll_stops(self, session: "ClientSession") -> None:
        url = sdk.stop_url()
        if url is None:
            log.warning("The platform gave no URL to poll for stops; cancelled jobs keep running.")
            return
        poll = poll_for_stops()
        while True:
            job_ids, pause_s = await poll.get(session, url)
            for job_id in job_ids:
                self._start(session, self._jobs.stop(job_id))
            await self._drain.sleep(pause_s)

    def _cancel_late_jobs(self) -> None:
        """Cancels jobs that run past the cut, and posts of results past the end of the drain."""
        for job in self._jobs.open:
            since = job.answering_since
            if since is None:
                is_late = self._drain.is_cut
            else:
                is_late = self._drain.is_over and time.monotonic() - since > GRACE_S
            if is_late:
                job.cancel()

    async def _run(self, session: "ClientSession", job: Job) -> None:
        """Runs one job until its result is posted, or the platform has stopped it."""
        running_job.set(job.id)
        posts = JobPosts(session, job, self._drain, self._large_results, *sdk.post_urls())
        try:
            if job.is_stopped:
                return
            error: ServeError | None
            if self._drain.is_cut:
                error = Draining("The worker is stopping; send the job again.")
            elif job.was_stopped_early:
                error = InternalError("The job was stopped before it began; send it again.")
            else:
                error = await self._wait_for(job, self._handler.answer(job.payload, posts))
            if error is not None:
                job.answering()
                await self._wait_for(job, self._handler.refuse(job.payload, posts, error))
        finally:
            later = self._jobs.close(job)
            if not self._jobs.is_open(job.id):
                self._sdk.finished(job.id)
            self._start(session, later)

    async def _wait_for(self, job: Job, work: Coroutine[Any, Any, None]) -> ServeError | None:
        """Waits for `work`, until the job is stopped or cancelled. Returns the error to refuse the
        job with, or None."""
        job.task = asyncio.create_task(work)
        await asyncio.wait({job.task})
        if job.task.cancelled():
            if job.is_stopped:
                if job.answering_since is None:
                    log.info("Job stopped: %s", job.id)
                return None
            if job.answering_since is None:
                return Draining("The worker is stopping; send the job again.")
            log.error("job %r: the result could not be delivered in time.", job.id)
        elif (failure := job.task.exception()) is not None:
            log.error("job %r: %s", job.id, type(failure).__name__, exc_info=failure)
            if job.answering_since is None:
                return InternalError("An internal error occurred; send the job again.")
        return None
