"""The jobs of one endpoint: their states, and counts of what workers did with them."""

import asyncio
import time
import uuid
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from emulator.policy import Policy

WORKER_MEMORY_S = 30.0
"""Seconds for which a worker counts after its last poll or ping."""
TERMINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"}


@dataclass
class Job:
    """One job. `request` is the client's body: `input` and any other fields."""

    id: str
    request: dict[str, Any]
    policy: Policy = field(default_factory=Policy)
    created: float = field(default_factory=time.monotonic)
    started: float | None = None
    ended: float | None = None
    status: str = "IN_QUEUE"
    output: Any = None
    error: Any = None
    chunks: list[Any] = field(default_factory=list)
    """The streamed chunks, in the order of their posts."""
    num_read: int = 0
    """Number of chunks that the client has already read."""
    progress: list[Any] = field(default_factory=list)
    num_results: int = 0
    """Number of acknowledged posts of a result; a correct worker makes exactly one per job."""
    num_late_posts: int = 0
    """Number of posts of any kind after the job's end."""
    num_retries: int = 0
    """Number of retries by the client."""
    num_deliveries: int = 0
    """Number of deliveries to workers."""
    pod: str = ""
    """Id of the worker that runs the job."""
    has_changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set at the next change, which also replaces the event with a new one."""

    @property
    def is_over(self) -> bool:
        return self.status in TERMINAL

    def changed(self) -> None:
        event, self.has_changed = self.has_changed, asyncio.Event()
        event.set()

    def end(self, status: str) -> None:
        self.status, self.ended = status, time.monotonic()
        self.changed()

    def view(self) -> dict[str, Any]:
        """Returns the object that `/status` returns; times in milliseconds."""
        now = time.monotonic()
        view: dict[str, Any] = {"id": self.id, "status": self.status}
        view["delayTime"] = round(((self.started or self.ended or now) - self.created) * 1000)
        if self.started is not None:
            view["executionTime"] = round(((self.ended or now) - self.started) * 1000)
        if self.pod:
            view["workerId"] = self.pod
        if self.output is not None:
            view["output"] = self.output
        if self.error is not None:
            view["error"] = self.error
        return view


class Queue:
    """All jobs of one endpoint, and the polls and pings of its workers."""

    def __init__(self) -> None:
        self.jobs: dict[str, Job] = {}
        self.pings: list[dict[str, str]] = []
        self.policy = Policy()
        """The endpoint's time limits, for jobs whose clients set none."""
        self.hold_s = 1.0
        """Seconds for which an empty poll is held open."""
        self.silence_s: float | None = None
        """Seconds without a ping or a poll after which a worker loses its jobs; None is no limit.
        A job goes back to the queue the first time, and is TIMED_OUT the second time (a guess)."""
        self.num_polls = 0
        """Number of polls for jobs so far."""
        self.last_limit = 0
        """The number of jobs that the last poll asked for: the worker's free slots."""
        self.num_cancels_at_take = 0
        """Cancels this many of the next jobs at the moment that a worker takes them."""
        self.num_open_polls = 0
        """Number of polls for jobs that are held open now."""
        self.is_paused = False
        self._waiting: deque[Job] = deque()
        self._stops: list[str] = []
        self._last_seen: dict[str, float] = {}
        self._work = asyncio.Condition()
        self._num_ends = 0

    async def add(self, request: dict[str, Any], prefix: str = "") -> Job:
        """Adds a job. Raises `ValueError` for a wrong `policy`."""
        policy = self.policy.with_request(request)
        job = Job(f"{prefix}{uuid.uuid4()}-u1", request, policy)
        self.jobs[job.id] = job
        async with self._work:
            self._waiting.append(job)
            self._work.notify_all()
        return job

    async def resume(self) -> None:
        """Delivers the jobs that have waited while `is_paused`."""
        async with self._work:
            self.is_paused = False
            self._work.notify_all()

    async def deliver_again(self, job: Job) -> None:
        async with self._work:
            self._waiting.append(job)
            self._work.notify_all()

    async def take(self, limit: int, pod: str = "") -> list[Job]:
        """Assigns up to `limit` jobs to the worker `pod`; returns [] after `hold_s` seconds."""
        self.num_polls += 1
        self.num_open_polls += 1
        self.last_limit = limit
        self.seen(pod)
        try:
            async with self._work:
                await self._held(lambda: bool(self._waiting) and not self.is_paused)
                if self.is_paused:
                    return []
                taken = [self._waiting.popleft() for _ in range(min(limit, len(self._waiting)))]
        finally:
            self.num_open_polls -= 1
        for job in taken:
            job.num_deliveries += 1
            job.pod = pod
            if not job.is_over:
                job.status, job.started = "IN_PROGRESS", time.monotonic()
            job.changed()
            if self.num_cancels_at_take > 0:
                self.num_cancels_at_take -= 1
                await self.cancel(job)
        return taken

    async def retry(self, job: Job) -> None:
        """Puts a failed job back in the queue, under its old id."""
        job.status, job.output, job.error, job.ended = "IN_QUEUE", None, None, None
        job.num_results, job.started = 0, None
        job.num_retries += 1
        job.changed()
        await self.deliver_again(job)

    def seen(self, pod: str) -> None:
        self._last_seen[pod] = time.monotonic()

    async def requeue_jobs_of_silent_workers(self) -> None:
        """Requeues the jobs of workers that were silent for `silence_s` seconds."""
        if self.silence_s is None:
            return
        since = time.monotonic() - self.silence_s
        for job in self.jobs.values():
            if job.status == "IN_PROGRESS" and self._last_seen.get(job.pod, 0.0) < since:
                if job.num_deliveries > 1:
                    job.end("TIMED_OUT")
                else:
                    job.status = "IN_QUEUE"
                    await self.deliver_again(job)

    async def end_expired_jobs(self) -> None:
        """Ends the jobs whose time limits have passed."""
        now = time.monotonic()
        for job in [job for job in self.jobs.values() if not job.is_over]:
            if now - job.created > job.policy.ttl_s:
                if job.started is not None:
                    del self.jobs[job.id]
                await self._end_unanswered(job, "TIMED_OUT")
            elif job.started is not None and now - job.started > job.policy.execution_timeout_s:
                await self._end_unanswered(job, "TIMED_OUT")

    async def purge(self) -> int:
        """Cancels all waiting jobs (the status is a guess). Returns their number."""
        waiting = list(self._waiting)
        for job in waiting:
            await self.cancel(job)
        return len(waiting)

    async def cancel(self, job: Job) -> None:
        if not job.is_over:
            await self._end_unanswered(job, "CANCELLED")

    async def _end_unanswered(self, job: Job, status: str) -> None:
        async with self._work:
            if job in self._waiting:
                self._waiting.remove(job)
            else:
                self._stops.append(job.id)
                self._work.notify_all()
        job.end(status)

    async def stop(self, job: Job) -> None:
        """Sends the worker a stop for a job, whether it has the job or not."""
        async with self._work:
            self._stops.append(job.id)
            self._work.notify_all()

    async def stops(self) -> list[str]:
        """Returns the ids of the jobs that the worker must stop; [] after `hold_s` seconds."""
        async with self._work:
            await self._held(lambda: bool(self._stops))
            stops, self._stops = self._stops, []
        return stops

    async def end_polls(self) -> None:
        """Ends the open polls, as after `hold_s` seconds."""
        async with self._work:
            self._num_ends += 1
            self._work.notify_all()

    async def _held(self, is_there: Any) -> None:
        num_ends = self._num_ends
        try:
            await asyncio.wait_for(
                self._work.wait_for(lambda: is_there() or self._num_ends > num_ends), self.hold_s
            )
        except TimeoutError:
            pass

    def workers(self) -> dict[str, int]:
        """Returns the numbers of workers with and without jobs, among those that were seen
        lately."""
        since = time.monotonic() - WORKER_MEMORY_S
        seen = {pod for pod, last in self._last_seen.items() if last > since}
        running = {job.pod for job in self.jobs.values() if job.status == "IN_PROGRESS"} & seen
        return {"idle": len(seen - running), "running": len(running)}

    def count(self, status: str) -> int:
        return sum(job.status == status for job in self.jobs.values())
