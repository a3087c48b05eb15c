"""In-flight jobs: those taken from the platform and not yet answered or stopped.

Each delivery of a job runs once. A second delivery is dropped while the first one runs and for
`MEMORY_S` seconds after its output was acknowledged.
"""

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Any

log = logging.getLogger(__name__)

MEMORY_S = 5.0
"""How long an answered job, or a stop that came before its job, is remembered. Short, because
`/retry` sends a job once more under its old id."""


@dataclass(eq=False, slots=True)
class Job:
    """One delivery of a job, and how far it is."""

    id: str
    given: dict[str, Any]
    """The platform's object: `id`, `input`, and whatever else it sends."""
    task: asyncio.Task[None] | None = None
    """Runs the handler, from the job's start on."""
    is_stopped: bool = False
    """The platform wants no answer any more."""
    was_stopped_early: bool = False
    """A stop came just before the job; it may have been meant for an earlier delivery."""
    answering_since: float | None = None
    """When its result was decided, on the monotonic clock; nothing else may be posted instead."""
    is_output_acknowledged: bool = False
    """The platform has its output; a failure does not count, as it may be sent again."""

    def answering(self) -> None:
        """Marks the result as decided; a second call changes nothing."""
        if self.answering_since is None:
            self.answering_since = time.monotonic()

    def stop(self) -> None:
        """Ends the job without an answer."""
        self.is_stopped = True
        if self.task is not None:
            self.task.cancel()


class InFlightJobs:
    """The jobs that are not yet answered, and ids answered or stopped in the last seconds."""

    def __init__(self) -> None:
        self.open: list[Job] = []
        self._answered: dict[str, float] = {}
        self._stopped: dict[str, float] = {}

    def accept(self, taken: list[Any]) -> list[Job]:
        """Adds the jobs of one poll; returns those to run and logs why the others are dropped."""
        accepted: list[Job] = []
        for given in taken:
            job_id = given.get("id") if isinstance(given, dict) else None
            if not isinstance(job_id, str) or not job_id:
                log.error("A job came without an id, so it cannot be answered.")
            elif self._has(job_id):
                log.warning("job %r came twice; it is answered once.", job_id)
            else:
                _forget_old(self._stopped)
                was_stopped = self._stopped.pop(job_id, None) is not None
                job = Job(job_id, given, was_stopped_early=was_stopped)
                self.open.append(job)
                accepted.append(job)
        return accepted

    def stop(self, job_id: str) -> None:
        """Stops the job, or remembers the stop for a job that comes a moment later."""
        _forget_old(self._stopped)
        jobs = [job for job in self.open if job.id == job_id]
        for job in jobs:
            job.stop()
        if not jobs and job_id not in self._answered:
            self._stopped[job_id] = time.monotonic()

    def close(self, job: Job) -> None:
        """Removes the job: it is answered or stopped. A late delivery of an answer is dropped."""
        self.open = [other for other in self.open if other is not job]
        if job.is_output_acknowledged:
            _forget_old(self._answered)
            self._answered[job.id] = time.monotonic()

    def _has(self, job_id: str) -> bool:
        _forget_old(self._answered)
        is_open = any(job.id == job_id and not job.is_stopped for job in self.open)
        return is_open or job_id in self._answered


def _forget_old(times: dict[str, float]) -> None:
    oldest = time.monotonic() - MEMORY_S
    for job_id in [job_id for job_id, when in times.items() if when < oldest]:
        del times[job_id]
