"""Jobs from their take to their answer: each delivery is run once, and answered once or stopped.

Knows neither the SDK nor the platform's addresses.
"""

import asyncio
import logging
import time
from typing import Any

log = logging.getLogger(__name__)

MEMORY_S = 5.0
"""How long an answered job, or a stop that came before its job, is remembered. Short: a job that
a client sends once more by `/retry` comes under its old id."""


class Job(dict[str, Any]):
    """One delivery of a job, as the SDK hands it about: the platform's object, and its state."""

    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__(given)
        self.id: str = given["id"]
        self.task: asyncio.Task[None] | None = None
        """What answers it, from its begin on."""
        self.is_stopped = False
        """The platform wants no answer any more."""
        self.was_stopped_early = False
        """A stop came just before the job did; it may have been meant for an earlier delivery."""
        self.answering_since: float | None = None
        """When its terminal body was decided; nothing else may be posted in its place."""
        self.streams = True
        """False once a chunk was lost: text with a gap would be worse than text that ends."""

    def answering(self) -> None:
        if self.answering_since is None:
            self.answering_since = time.monotonic()

    def stop(self) -> None:
        self.is_stopped = True
        if self.task is not None:
            self.task.cancel()


class Taken:
    """The deliveries that are still to be answered, and what has happened just before."""

    def __init__(self) -> None:
        self.open: list[Job] = []
        self._answered: dict[str, float] = {}
        self._stopped: dict[str, float] = {}

    def accept(self, given: Any) -> list[Job]:
        """The jobs in what a take brought that are to be run; says in the log which are not."""
        accepted: list[Job] = []
        for item in given if isinstance(given, list) else [given]:
            job_id = item.get("id") if isinstance(item, dict) else None
            if not isinstance(job_id, str) or not job_id:
                log.error("A job came without an id; nobody can be answered.")
            elif self._has(job_id):
                log.warning("job %r came twice; it is answered once.", job_id)
            else:
                # The SDK passes the rest as keyword arguments, where this name is taken.
                job = Job({name: value for name, value in item.items() if name != "self"})
                _forget(self._stopped)
                job.was_stopped_early = self._stopped.pop(job_id, None) is not None
                self.open.append(job)
                accepted.append(job)
        return accepted

    def stop(self, job_id: str) -> None:
        """Stops a job that waits or runs; a job that comes a moment later hears of it too."""
        _forget(self._stopped)
        jobs = [job for job in self.open if job.id == job_id]
        for job in jobs:
            job.stop()
        if not jobs and job_id not in self._answered:
            self._stopped[job_id] = time.monotonic()

    def answered(self, job: Job) -> None:
        """The platform has the output: another delivery of the same job is a late echo.

        A failure is not remembered, as its client may have sent it again.
        """
        _forget(self._answered)
        self._answered[job.id] = time.monotonic()

    def close(self, job: Job) -> None:
        self.open = [other for other in self.open if other is not job]

    def _has(self, job_id: str) -> bool:
        _forget(self._answered)
        is_open = any(job.id == job_id and not job.is_stopped for job in self.open)
        return is_open or job_id in self._answered


def _forget(times: dict[str, float]) -> None:
    since = time.monotonic() - MEMORY_S
    for job_id in [job_id for job_id, when in times.items() if when < since]:
        del times[job_id]
