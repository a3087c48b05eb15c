"""SIGTERM to a RunPod worker with Ray and a model: every job is answered, no process stays."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from emulator.platform import Platform
from emulator.queue import Job
from emulator.worker import Worker
from tests.processes import replica_of
from tests.settled import settled
from tests.worker.conftest import TINY, Client, until

pytestmark = [pytest.mark.faults, pytest.mark.ray]

LONG = {"prompt": "x", "ignore_eos": True, "max_tokens": 16_000}
SHORT: dict[str, Any] = {"MIXTRAL_RUNPOD__DRAIN_S": "2", "SERVE_CONFIG": str(TINY)}


@pytest.fixture
def platform() -> Iterator[Platform]:
    with Platform() as platform:
        yield platform


def assert_refused(client: Client, job: Job) -> None:
    error = client.error_of(job)["error"]
    assert (error["code"], error["retry"]) == ("draining", True)


@pytest.mark.parametrize("words", ["status", "device"])
def test_jobs_that_wait_for_the_model_are_refused(
    platform: Platform, tmp_path: Path, words: str
) -> None:
    """Jobs that wait while Ray starts or the replica loads are refused; the exit code is 0."""
    with Worker(platform, tmp_path, **SHORT, MIXTRAL_RUNPOD__PROGRESS_INTERVAL_S="0.1") as worker:
        client = Client(platform)
        jobs = [client.submit({"prompt": "x"}) for _ in range(2)]
        until(lambda: any(words in str(update) for update in jobs[0].progress))
        if words == "device":  # from now on the load would take for ever
            os.kill(replica_of(worker.process.pid), signal.SIGSTOP)
        assert worker.terminate() == 0, worker.log
        settled(platform, worker)
    assert "Controller failed to shut down" not in worker.log  # Serve's farewell waits for the load
    for job in jobs:
        assert_refused(client, job)


def test_a_signal_while_ray_starts_aborts_nothing(platform: Platform, tmp_path: Path) -> None:
    """Ray's handler of signals, which aborts a process after 3 s, does not cost the job."""
    with Worker(platform, tmp_path, SERVE_CONFIG=str(TINY)) as worker:
        job = Client(platform).submit({"prompt": "x", "max_tokens": 2})
        until(lambda: "Cold start: process" in worker.log)
        assert worker.terminate() == 0, worker.log
        settled(platform, worker)
    assert job.is_over


def test_running_and_late_jobs_are_answered(platform: Platform, tmp_path: Path) -> None:
    """Jobs longer than `runpod.drain_s` are refused; a job that the open poll brings is run."""
    with Worker(platform, tmp_path, **SHORT) as worker:
        client = Client(platform)
        stream = client.submit({**LONG, "stream": True})
        until(lambda: stream.chunks)
        whole = client.submit(LONG)
        until(lambda: whole.status == "IN_PROGRESS")
        platform.queue.hold_s = 20
        num_polls = platform.queue.num_polls
        until(lambda: platform.queue.num_polls > num_polls)
        worker.process.terminate()
        until(lambda: "Stopping: " in worker.log)
        late = client.submit({"prompt": "x", "max_tokens": 2})
        assert worker.process.wait(60) == 0, worker.log
        settled(platform, worker)
    assert late.status == "COMPLETED", late.error
    assert_refused(client, whole)
    assert_refused(client, stream)
    assert stream.chunks[-1]["finish_reason"] == "error"
