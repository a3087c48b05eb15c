"""In-flight jobs: jobs that were taken from the platform and are not yet answered or stopped.

The platform may deliver a job again under the same id, by mistake or because a client retries the
job. The state of the earlier delivery decides what happens to the later delivery:

    running, or its output is being posted   it is kept. It runs if the platform stops the earlier
                                             delivery, and is dropped if the earlier is answered.
    its failure is being posted              it runs, and the post ends: the platform has the
                                             failure, because a client has retried the job.
    its output was acknowledged just now     it is dropped. It runs if a stop follows, because then
                                             the platform did not accept the output.
    any other                                it runs.
"""

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Any

from serve_app.worker.job import num_prompts

log = logging.getLogger(__name__)

MEMORY_S = 5.0
"""Seconds for which an answered job, or a stop that arrived before its job, is remembered. This is
short, because `/retry` sends a job again under its old id."""


@dataclass(eq=False, slots=True)
class Job:
    """One delivery of a job, and its state."""

    id: str
    payload: dict[str, Any]
    """The platform's object with `id`, `input` and other fields."""
    task: asyncio.Task[None] | None = None
    """The task that runs the handler; None before the job starts."""
    is_stopped: bool = False
    """Whether the platform has stopped the job, so that it needs no answer."""
    was_stopped_early: bool = False
    """Whether a stop arrived just before the job. The stop may belong to an earlier delivery."""
    answering_since: float | None = None
    """Time at which the result became final, in seconds of `time.monotonic`; None before that."""
    is_failing: bool = False
    """Whether its result is a failure, which is being posted."""
    is_output_acknowledged: bool = False
    """Whether the platform has acknowledged its output. False for a failure, because a client may
    retry the job."""
    num_prompts: int = 1
    """The number of prompts in its list."""
    redelivery: dict[str, Any] | None = None
    """A later delivery of the same job, which runs if the platform stops this one."""

    def answering(self) -> None:
        """Marks the result as final; a second call changes nothing."""
        if self.answering_since is None:
            self.answering_since = time.monotonic()

    def stop(self) -> None:
        """Ends the job without an answer."""
        self.is_stopped = True
        self.cancel()

    def cancel(self) -> None:
        """Cancels the task that runs it, once: a second cancellation would interrupt its
        clean-up."""
        if self.task is not None and not self.task.cancelling():
            self.task.cancel()


class InFlightJobs:
    """The jobs that are not yet answered, and ids answered or stopped in the last seconds."""

    def __init__(self) -> None:
        self.open: list[Job] = []
        self._answered: dict[str, float] = {}
        self._dropped: dict[str, dict[str, Any]] = {}
        """Later deliveries of answered jobs."""
        self._stopped: dict[str, float] = {}

    def accept(self, payloads: list[Any]) -> list[Job]:
        """Adds the jobs of one poll. Returns those to run, and logs the reason for each dropped
        one."""
        accepted: list[Job] = []
        for payload in payloads:
            job_id = payload.get("id") if isinstance(payload, dict) else None
            if not isinstance(job_id, str) or not job_id:
                log.error("A job has no id, so it cannot be answered.")
            elif self._may_run(job_id, payload):
                _forget_old(self._stopped)
                was_stopped = self._stopped.pop(job_id, None) is not None
                job = Job(job_id, payload, was_stopped_early=was_stopped)
                job.num_prompts = num_prompts(payload)
                self.open.append(job)
                accepted.append(job)
        return accepted

    def stop(self, job_id: str) -> list[dict[str, Any]]:
        """Stops the job, or remembers the stop for a job that arrives a moment later.

        Returns the later delivery of an answered job, which must be accepted.
        """
        _forget_old(self._stopped)
        jobs = [job for job in self.open if job.id == job_id]
        for job in jobs:
            job.stop()
        if jobs:
            return []
        # A stop after the answer means that the platform did not accept it, so a retry must run.
        if self._answered.pop(job_id, None) is None:
            self._stopped[job_id] = time.monotonic()
        dropped = self._dropped.pop(job_id, None)
        return [] if dropped is None else [dropped]

    def close(self, job: Job) -> list[dict[str, Any]]:
        """Removes the answered or stopped job. Returns the later delivery that must be accepted."""
        self.open = [other for other in self.open if other is not job]
        if job.is_output_acknowledged:
            self._answered[job.id] = time.monotonic()
            if job.redelivery is not None and not job.is_stopped:
                self._dropped[job.id] = job.redelivery
            self._forget_answered()
        return [job.redelivery] if job.is_stopped and job.redelivery is not None else []

    @property
    def num_prompts(self) -> int:
        """Number of prompts of all jobs that are not yet answered or stopped."""
        return sum(job.num_prompts for job in self.open)

    def may_take(self, max_prompts: int) -> int:
        """Returns how many more jobs to request from the platform to run about `max_prompts`
        prompts.

        The size of a job is known only after it is taken, so each job is assumed to be as large as
        the largest running one.
        """
        free = max_prompts - self.num_prompts
        largest = max((job.num_prompts for job in self.open), default=1)
        return max(free // largest, 1) if free > 0 else 0

    def is_open(self, job_id: str) -> bool:
        return any(job.id == job_id for job in self.open)

    def _may_run(self, job_id: str, payload: dict[str, Any]) -> bool:
        """Returns whether a delivery runs now. Otherwise keeps or drops it; stops an earlier
        delivery that it replaces."""
        self._forget_answered()
        if job_id in self._answered:
            self._dropped[job_id] = payload
            log.warning("job %r was delivered again after its answer; it is dropped.", job_id)
            return False
        for job in self.open:
            if job.id != job_id or job.is_stopped:
                continue
            if not job.is_failing:
                log.warning("job %r was delivered twice; it is answered once.", job_id)
                job.redelivery = payload
                return False
            log.info("job %r was delivered again after it had failed; it runs again.", job_id)
            job.redelivery = None
            job.stop()
        return True

    def _forget_answered(self) -> None:
        _forget_old(self._answered)
        for job_id in self._dropped.keys() - self._answered.keys():
            del self._dropped[job_id]


def _forget_old(times: dict[str, float]) -> None:
    oldest = time.monotonic() - MEMORY_S
    for job_id in [job_id for job_id, when in times.items() if when < oldest]:
        del times[job_id]
