"""The real SDK's worker loop around our handler, against the platform; the model is scripted."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.emulator.platform import Platform
from tests.emulator.worker import Worker
from tests.worker.conftest import Client, until

SCRIPT = Path(__file__).with_name("scripted_worker.py")


@pytest.fixture(scope="module")
def platform() -> Iterator[Platform]:
    with Platform() as platform:
        yield platform


@pytest.fixture(scope="module")
def worker(platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    home = tmp_path_factory.mktemp("home")
    with Worker(platform, home, script=SCRIPT, arguments=["--start-s", "1"]) as worker:
        yield worker


def test_a_job_hears_the_load_and_gets_one_result(platform: Platform, worker: Worker) -> None:
    """Progress comes while the model starts, and nothing at all after the result."""
    job = Client(platform).submit({"prompt": "hello"})
    until(lambda: job.is_over)
    assert (job.status, job.output) == ("COMPLETED", [{"text": "hello"}])
    assert len(job.progress) >= 2
    assert job.progress[-1] == {
        "status": "loading",
        "load": [{"phase": "weights", "seconds": 0.5}],
    }
    assert (job.num_results, job.num_late_posts) == (1, 0)


def test_slow_posts_merge_tokens_and_lose_none(platform: Platform, worker: Worker) -> None:
    """A platform slow to acknowledge gets fewer, longer chunks; their text is the whole text."""
    platform.faults.delay_s["job-stream"] = 0.1
    try:
        job = Client(platform).submit({"prompt": "500", "stream": True})
        until(lambda: job.is_over)
    finally:
        platform.faults.clear()
    assert job.output == job.chunks
    assert job.chunks[0]["token"] == "0 "
    assert "".join(chunk["token"] for chunk in job.chunks) == "".join(f"{n} " for n in range(500))
    assert job.chunks[-1]["finished"]
    assert len(job.chunks) < 250


@pytest.mark.parametrize("delay_s", [0.0, 0.5])
def test_a_cancelled_job_frees_its_call(platform: Platform, worker: Worker, delay_s: float) -> None:
    """Cancelled between two posts or in the middle of one, the call to the model is closed."""
    platform.faults.delay_s["job-stream"] = delay_s
    num_closed = worker.log.count("closed")
    try:
        job = Client(platform).submit({"prompt": "hold", "stream": True})
        until(lambda: worker.log.count("call") > num_closed)
        Client(platform).cancel(job)
        until(lambda: worker.log.count("closed") > num_closed)
    finally:
        platform.faults.clear()
    assert (job.status, job.num_results) == ("CANCELLED", 0)


@pytest.mark.parametrize("given", [None, {}, "text", [1]])
def test_unreadable_inputs_are_answered(platform: Platform, worker: Worker, given: Any) -> None:
    """A job with a bad input fails with a JSON string that says what to send."""
    job = Client(platform).submit(given)
    until(lambda: job.is_over)
    error = json.loads(job.error)["error"]
    assert (job.status, error["status"]) == ("FAILED", "VALIDATION_FAILED")
    assert error["param"] == "input"


def test_sigterm_lets_jobs_finish(tmp_path: Path) -> None:
    """Told to stop in the middle of a stream, the worker answers it and exits with 0."""
    with (
        Platform() as platform,
        Worker(platform, tmp_path, script=SCRIPT) as worker,
    ):
        job = Client(platform).submit({"prompt": "1000", "stream": True})
        until(lambda: job.chunks)
        code = worker.terminate()
    assert code == 0
    assert (job.status, job.num_results) == ("COMPLETED", 1)
    assert "".join(chunk["token"] for chunk in job.output) == "".join(f"{n} " for n in range(1000))


def test_a_job_handed_out_after_sigterm_is_answered(tmp_path: Path) -> None:
    """The poll that was open at SIGTERM may still bring a job; the SDK alone would lose it."""
    with (
        Platform() as platform,
        Worker(platform, tmp_path, script=SCRIPT) as worker,
    ):
        first = Client(platform).submit({"prompt": "1"})
        until(lambda: first.is_over)
        num_polls = platform.queue.num_polls
        until(lambda: platform.queue.num_polls > num_polls)
        worker.process.terminate()
        # The SDK's loop ends within 0.1 s, which nothing shows; its poll is open for a second.
        # A job that comes sooner is answered by the SDK itself.
        time.sleep(0.3)
        late = Client(platform).submit({"prompt": "2"})
        assert worker.process.wait(30) == 0
    assert (late.status, late.output) == ("COMPLETED", [{"text": "2"}])
