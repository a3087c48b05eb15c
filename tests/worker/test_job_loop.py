"""The job loop in the real SDK, against the emulator; the model follows a script."""

from pathlib import Path
from typing import Any

import pytest

from emulator.platform import Platform
from emulator.worker import Worker
from tests.settled import settled
from tests.worker.conftest import SCRIPT, Client, until


def test_a_job_gets_progress_and_one_result(tmp_path: Path) -> None:
    """Progress is posted while the model starts, and nothing after the result."""
    with (
        Platform() as platform,
        Worker(platform, tmp_path, script=SCRIPT, arguments=["--start-s", "1"]) as worker,
    ):
        job = Client(platform).ended({"prompt": "hello"})
        settled(platform, worker)
    assert (job.status, job.output) == ("COMPLETED", {"text": "hello"})
    assert len(job.progress) >= 2
    assert job.progress[-1] == {
        "status": "loading",
        "load": [{"phase": "read", "seconds": 0.5}],
    }
    assert (job.num_results, job.num_late_posts) == (1, 0)


def test_slow_posts_merge_tokens_and_lose_none(scripted: Client) -> None:
    """A slow platform gets fewer, longer chunks, which together have the whole text."""
    scripted.platform.faults.delay_s["job-stream"] = 0.1
    job = scripted.ended({"prompt": "500", "stream": True})
    assert job.output == job.chunks
    assert job.chunks[0]["token"] == "0 "
    assert "".join(chunk["token"] for chunk in job.chunks) == "".join(f"{n} " for n in range(500))
    assert job.chunks[-1]["finished"]
    assert len(job.chunks) < 250


def test_a_job_cancelled_during_a_post_frees_its_call(
    scripted: Client, scripted_worker: Worker
) -> None:
    """A stop ends the call to the model while a chunk is still unacknowledged."""
    scripted.platform.faults.delay_s["job-stream"] = 1000
    num_calls = scripted_worker.log.count("\ncall ")
    job = scripted.submit({"prompt": "hold", "stream": True})
    until(lambda: job.chunks)
    scripted.cancel(job)
    until(lambda: scripted_worker.log.count("\nclosed ") > num_calls)
    assert (job.status, job.num_results) == ("CANCELLED", 0)


@pytest.mark.parametrize("given", [None, {}, "text", [1]])
def test_unreadable_inputs_are_answered(scripted: Client, given: Any) -> None:
    """A job with a bad input fails with a JSON string that says what to send."""
    error = scripted.error_of(scripted.ended(given))["error"]
    assert error["status"] == "VALIDATION_FAILED"
    assert error["param"] == "input"
