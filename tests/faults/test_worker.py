"""A RunPod worker whose processes are killed under it: what each job hears."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.emulator.platform import Platform
from tests.emulator.worker import Worker
from tests.faults.conftest import spoil
from tests.processes import replica_of
from tests.settled import settled
from tests.worker.conftest import TINY, Client, until

pytestmark = [pytest.mark.faults, pytest.mark.ray]

LONG = {"prompt": "x", "ignore_eos": True, "max_tokens": 1500}


@pytest.fixture(scope="module")
def platform() -> Iterator[Platform]:
    with Platform() as platform:
        yield platform


@pytest.fixture(scope="module")
def worker(platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """One worker for all faults that it survives; the last test stops it."""
    home = tmp_path_factory.mktemp("home")
    with Worker(platform, home, SERVE_CONFIG=str(TINY)) as worker:
        yield worker


@pytest.fixture
def client(platform: Platform, worker: Worker) -> Iterator[Client]:
    """A client of the worker; after each test all is in order again."""
    yield Client(platform)
    settled(platform, worker)


def test_a_killed_replica_fails_the_stream_and_not_the_worker(
    client: Client, worker: Worker
) -> None:
    """A stream that has spoken ends with CONNECTION_ERROR; the next job is answered."""
    job = client.submit({**LONG, "stream": True})
    until(lambda: job.chunks)
    os.kill(replica_of(worker.process.pid), signal.SIGKILL)
    until(lambda: job.is_over)
    error = client.error_of(job)["error"]
    assert (error["status"], error["retry"]) == ("CONNECTION_ERROR", True)
    assert job.chunks[-1]["finish_reason"] == "error"
    assert client.ended({"prompt": "x", "max_tokens": 3}).status == "COMPLETED"


def test_a_killed_replica_costs_a_silent_job_nothing(client: Client, worker: Worker) -> None:
    """A job that has not said a word is tried once more, and its client never knows."""
    job = client.submit(LONG)

    def is_running() -> bool:
        health: dict[str, Any] = client.ended({"endpoint": "/health"}).output[0]
        return bool(health["engine"]["running"])

    until(is_running)
    os.kill(replica_of(worker.process.pid), signal.SIGKILL)
    until(lambda: job.is_over)
    assert job.status == "COMPLETED", job.error
    assert job.num_results == 1


def test_sigterm_during_a_job_is_answered(client: Client, worker: Worker) -> None:
    """Ray takes SIGTERM for itself when it starts; the SDK must have it back, and drain."""
    job = client.submit({**LONG, "stream": True})
    until(lambda: job.chunks)
    assert worker.terminate() == 0, worker.log
    assert (job.status, job.num_results) == ("COMPLETED", 1)
    assert job.output[-1]["usage"]["completion_tokens"] == 1500


def test_a_model_that_cannot_load_says_why(tmp_path: Path, config: Path, checkpoint: Path) -> None:
    """Every waiting job hears the cause, the next one at once, and the worker lives on."""
    spoil(checkpoint)
    with Platform() as platform, Worker(platform, tmp_path, SERVE_CONFIG=str(config)) as worker:
        client = Client(platform)
        jobs = [client.submit({"prompt": "x"}) for _ in range(3)]
        until(lambda: all(job.is_over for job in jobs))
        jobs.append(client.ended({"prompt": "x"}))
        health = client.ended({"endpoint": "/health"}).output[0]
        code = worker.terminate()
        settled(platform, worker)
    for job in jobs:
        error = client.error_of(job)["error"]
        assert (error["status"], error["code"]) == ("MODEL_LOAD_FAILED", "model_load_failed")
        assert "tokenizer cannot be read" in error["message"]
    assert health["status"] == "failed"
    assert "tokenizer cannot be read" in health["reason"]
    assert code == 0


def test_a_lost_network_is_told_to_the_jobs(tmp_path: Path) -> None:
    """A hub that cannot be reached does not end the worker, which would leave its jobs waiting."""
    with (
        Platform() as platform,
        Worker(
            platform,
            tmp_path,
            SERVE_CONFIG=str(TINY),
            MODEL_NAME="owner/absent",
            HF_ENDPOINT="http://127.0.0.1:9",
        ) as worker,
    ):
        job = Client(platform).ended({"prompt": "x"})
        error = Client(platform).error_of(job)["error"]
        code = worker.terminate()
        settled(platform, worker)
    assert (error["status"], error["retry"]) == ("MODEL_LOAD_FAILED", True)
    assert "owner/absent" in error["message"]
    assert code == 0
