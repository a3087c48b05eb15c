"""Posts that the platform refuses, loses or acknowledges late."""

from pathlib import Path

import pytest

from emulator.faults import HELD, LOST, RESET, Fault
from emulator.platform import Platform
from emulator.worker import Worker
from tests.settled import settled
from tests.worker.conftest import SCRIPT, Client, until

STREAM = {"prompt": "50", "stream": True}
WORDS = "".join(f"{n} " for n in range(50))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "faults", [[500], [400], [401, 404], [RESET], [LOST], [429, RESET], [HELD]], ids=repr
)
def test_a_result_is_posted_until_it_is_acknowledged(
    scripted: Client, faults: list[int | Fault], stream: bool
) -> None:
    """A result that is refused, reset or unanswered is posted until one acknowledgement."""
    platform = scripted.platform
    before = platform.faults.num_requests["job-done"]
    platform.faults.inject("job-done", *faults)
    job = scripted.submit({"prompt": "3", "stream": stream})
    until(lambda: job.num_results)
    assert (job.status, job.num_results) == ("COMPLETED", 1)
    assert platform.faults.num_planned == 0
    assert platform.faults.num_requests["job-done"] - before == len(faults) + 1


def test_an_error_is_posted_until_it_is_acknowledged(scripted: Client) -> None:
    """A failed job's error is posted until it is acknowledged."""
    scripted.platform.faults.inject("job-done", 400, RESET)
    job = scripted.ended({"prompt": "refused"})
    assert scripted.error_of(job)["error"]["status"] == "VALIDATION_FAILED"


def test_slow_acknowledgements_are_waited_for(scripted: Client) -> None:
    """A repeated post waits longer than the last one; no post follows an acknowledgement."""
    scripted.platform.faults.delay_s["job-done"] = 1.5
    job = scripted.submit({"prompt": "3"})
    until(lambda: job.num_results)
    assert (job.status, job.num_results, job.num_late_posts) == ("COMPLETED", 1, 1)


@pytest.mark.parametrize("fault", [500, 400, RESET])
def test_a_chunk_is_posted_again(scripted: Client, fault: int | Fault) -> None:
    """A refused chunk is posted again, and the stream is whole."""
    scripted.platform.faults.inject("job-stream", fault)
    job = scripted.ended(STREAM)
    assert job.status == "COMPLETED"
    assert "".join(chunk["token"] for chunk in job.chunks) == WORDS
    assert job.output == job.chunks


@pytest.mark.parametrize("fault", [500, 400, RESET, HELD])
def test_lost_chunks_do_not_cost_the_result(scripted: Client, fault: int | Fault) -> None:
    """A stream that cannot be delivered ends early, without a gap; its result is whole."""
    scripted.platform.faults.inject_always("job-stream", fault)
    job = scripted.ended(STREAM)
    assert (job.status, job.chunks) == ("COMPLETED", [])
    assert "".join(chunk["token"] for chunk in job.output) == WORDS


def test_an_unreachable_platform_loses_no_job(scripted: Client, scripted_worker: Worker) -> None:
    """Jobs that ran while the platform was unreachable are answered afterwards."""
    platform = scripted.platform
    running = scripted.submit({"prompt": "500", "stream": True})
    until(lambda: running.chunks)
    num = scripted_worker.log.count("Polls for jobs fail")
    with platform.unreachable():
        until(lambda: scripted_worker.log.count("Polls for jobs fail") > num)
        until(lambda: scripted_worker.log.count("the post of its result failed") > 0)
    until(lambda: running.num_results)
    assert running.status == "COMPLETED"
    assert scripted.ended({"prompt": "3"}).status == "COMPLETED"


def test_lost_progress_costs_nothing(tmp_path: Path) -> None:
    """A job is answered although its progress updates are lost."""
    with (
        Platform() as platform,
        Worker(platform, tmp_path, script=SCRIPT, arguments=["--start-s", "0.5"]) as worker,
    ):
        platform.faults.inject_always("progress", RESET)
        job = Client(platform).ended({"prompt": "3"})
        assert (job.status, job.progress) == ("COMPLETED", [])
        assert platform.faults.num_faults["progress"] > 0
        settled(platform, worker)
