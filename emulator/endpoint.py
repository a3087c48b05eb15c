"""Endpoint: the platform on loopback and a real worker with the tiny model, for measurements."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests

from emulator import client_api
from emulator.platform import Platform
from emulator.queue import Job
from emulator.worker import ENTRY, Worker

CONFIG = ENTRY.parent / "configs" / "tiny.yaml"
HEADERS = {"Authorization": f"Bearer {client_api.KEY}"}
JOB_POLL_S = 0.001
"""Seconds between two checks of a job. A check is cheap, because the job's record is in this
process."""


class Endpoint:
    """Sends jobs, and reads the platform's own record of each."""

    def __init__(self, platform: Platform, worker: Worker) -> None:
        self.platform = platform
        self.worker = worker
        self._session = requests.Session()

    def send(self, given: Any) -> Job:
        """Sends a job with the input `given`. Returns the platform's record of it."""
        job_id = self._post("run", {"input": given})["id"]
        return self.platform.queue.jobs[job_id]

    def cancel(self, job: Job) -> None:
        self._post(f"cancel/{job.id}", None)

    def done(self, given: Any, timeout_s: float = 120) -> Job:
        """Sends a job and waits for its end."""
        job = self.send(given)
        self.wait(lambda: job.is_over, timeout_s)
        return job

    def health(self) -> dict[str, Any]:
        """Returns the worker's `/health` object."""
        health: dict[str, Any] = self.done({"endpoint": "/health"}).output
        return health

    def wait(self, is_true: Any, timeout_s: float = 120) -> None:
        """Polls `is_true`.

        Raises `TimeoutError` with the end of the worker's log, immediately if the worker has ended.
        """
        end = time.monotonic() + timeout_s
        while not is_true():
            if time.monotonic() > end or self.worker.process.poll() is not None:
                raise TimeoutError(f"The worker's log ends:\n{self.worker.log[-2000:]}")
            time.sleep(JOB_POLL_S)

    def _post(self, path: str, body: Any) -> Any:
        url = f"{self.platform.url}/v2/ep/{path}"
        answer = self._session.post(url, json=body, headers=HEADERS, timeout=30)
        answer.raise_for_status()
        return answer.json()


@contextmanager
def endpoint(script: Path = ENTRY) -> Iterator[Endpoint]:
    """Runs a platform and a worker with `script`, and ends both with the block."""
    with (
        tempfile.TemporaryDirectory(prefix="endpoint-") as home,
        Platform() as platform,
        Worker(platform, Path(home), script=script, SERVE_CONFIG=str(CONFIG)) as worker,
    ):
        yield Endpoint(platform, worker)
