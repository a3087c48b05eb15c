"""Workers that tests share: one with Ray and the tiny model, one whose model follows a script."""

import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from emulator import client_api
from emulator.platform import Platform
from emulator.queue import Job
from emulator.worker import Worker
from tests.worker.scripted_model import HandlerOf, scripted_handler

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"
HEADERS = {"Authorization": f"Bearer {client_api.KEY}"}


class Client:
    """A client of the platform that returns the platform's own records of its jobs."""

    def __init__(self, platform: Platform) -> None:
        self.platform = platform

    def submit(self, given: Any) -> Job:
        return self.post({"input": given})

    def post(self, body: dict[str, Any]) -> Job:
        answer = requests.post(self._url("run"), json=body, headers=HEADERS, timeout=10)
        return self.platform.queue.jobs[answer.json()["id"]]

    def cancel(self, job: Job) -> None:
        url = self._url(f"cancel/{job.id}")
        requests.post(url, headers=HEADERS, timeout=10).raise_for_status()

    def retry(self, job: Job) -> None:
        url = self._url(f"retry/{job.id}")
        requests.post(url, headers=HEADERS, timeout=10).raise_for_status()

    def ended(self, given: Any) -> Job:
        """Returns the job after it has ended."""
        job = self.submit(given)
        until(lambda: job.is_over)
        return job

    def error_of(self, job: Job) -> dict[str, Any]:
        """Returns the failed job's error, which is one JSON string."""
        assert job.status == "FAILED", job.output
        assert isinstance(job.error, str)
        error: dict[str, Any] = json.loads(job.error)
        return error

    def _url(self, path: str) -> str:
        return f"{self.platform.url}/v2/ep/{path}"


def until(is_true: Callable[[], Any], timeout_s: float = 60) -> None:
    """Polls `is_true` until it holds; fails after `timeout_s` seconds."""
    end = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < end, "the time is up"
        time.sleep(0.02)


@pytest.fixture
def handler_of(tmp_path: Path) -> HandlerOf:
    """Makes the handler of a scripted model."""
    return functools.partial(scripted_handler, tmp_path)


@pytest.fixture(scope="session")
def tiny_platform() -> Iterator[Platform]:
    with Platform() as platform:
        yield platform


@pytest.fixture(scope="session")
def tiny_worker(
    tiny_platform: Platform, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Worker]:
    """The worker as the image runs it, with the tiny model. Its first job starts Ray."""
    home = tmp_path_factory.mktemp("tiny-home")
    with Worker(
        tiny_platform,
        home,
        SERVE_CONFIG=str(TINY),
        MIXTRAL_RUNPOD__PROGRESS_INTERVAL_S="0.2",
    ) as worker:
        yield worker


SCRIPT = Path(__file__).with_name("scripted_worker.py")


@pytest.fixture(scope="session")
def scripted_platform() -> Iterator[Platform]:
    with Platform() as platform:
        yield platform


@pytest.fixture(scope="session")
def scripted_worker(
    scripted_platform: Platform, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Worker]:
    """A worker with 8 slots and the real SDK, whose model follows a script; no Ray."""
    scripted_platform.queue.hold_s = 0.1  # no test waits long for the next poll
    home = tmp_path_factory.mktemp("scripted-home")
    arguments = ["--post-timeout-s", "1"]
    with Worker(scripted_platform, home, script=SCRIPT, arguments=arguments) as worker:
        yield worker


@pytest.fixture
def scripted(scripted_platform: Platform, scripted_worker: Worker) -> Iterator[Client]:
    """A client of the scripted worker. Afterwards it clears faults and settles every job."""
    from tests.settled import settled

    yield Client(scripted_platform)
    scripted_platform.faults.clear()
    try:
        settled(scripted_platform, scripted_worker)
    finally:  # so that a failure does not spread to the next test
        scripted_platform.queue.jobs.clear()


@pytest.fixture(scope="session")
def first_jobs(tiny_platform: Platform, tiny_worker: Worker) -> list[Job]:
    """The worker's first jobs: a `/health`, then two at once that start the model."""
    client = Client(tiny_platform)
    jobs = [client.ended({"endpoint": "/health"})]
    jobs += [client.submit({"prompt": "What is 2 + 3?", "temperature": 0}) for _ in range(2)]
    until(lambda: all(job.is_over for job in jobs))
    return jobs


@pytest.fixture
def client(tiny_platform: Platform, first_jobs: list[Job]) -> Client:
    """A client of the worker with the tiny model, after the model is loaded."""
    return Client(tiny_platform)
