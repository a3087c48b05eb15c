"""Draining: after SIGTERM or `JobLoop.end` every job that was taken is answered in time."""

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from emulator.platform import Platform
from emulator.queue import Job
from emulator.worker import Worker
from tests.settled import left_behind, settled
from tests.worker.conftest import SCRIPT, Client, until


@pytest.fixture
def platform() -> Iterator[Platform]:
    with Platform() as platform:
        platform.queue.hold_s = 0.1  # a worker that ends waits for its open poll
        yield platform


Start = Callable[..., Worker]


@pytest.fixture
def start(platform: Platform, tmp_path: Path) -> Iterator[Start]:
    """Starts a scripted worker with the given arguments, and waits for its first poll."""
    with ExitStack() as stack:

        def start(*arguments: str) -> Worker:
            worker = Worker(platform, tmp_path, script=SCRIPT, arguments=arguments)
            stack.enter_context(worker)
            until(lambda: platform.queue.num_polls)
            return worker

        yield start


def ended(platform: Platform, worker: Worker) -> int:
    """Waits for the worker's end and returns its exit code."""
    code = worker.process.wait(60)
    settled(platform, worker)
    return code


def send_sigterm(worker: Worker) -> None:
    worker.process.send_signal(signal.SIGTERM)
    until(lambda: "Stopping: " in worker.log)


def send_sigterm_in_a_poll(platform: Platform, worker: Worker) -> int:
    """Sends SIGTERM during a poll that the platform holds open.

    Returns the number of polls so far, this one included.
    """
    platform.queue.hold_s = 60
    num_polls = platform.queue.num_polls
    until(lambda: platform.queue.num_polls > num_polls)
    send_sigterm(worker)
    return num_polls + 1


def refusals(jobs: list[Job]) -> set[tuple[str, bool]]:
    errors = [json.loads(job.error)["error"] for job in jobs]
    return {(error["code"], error["retry"]) for error in errors}


def test_jobs_that_need_longer_are_refused(platform: Platform, start: Start) -> None:
    """Jobs that still run at the cut fail with `retry: true`; a stream ends with the error."""
    worker = start("--drain-s", "3")
    client = Client(platform)
    jobs = [client.submit({"prompt": p, "stream": True}) for p in ("hold", "mute")]
    jobs.append(client.submit({"prompt": "mute"}))
    short = client.submit({"prompt": "300", "stream": True})
    until(lambda: worker.log.count("\ncall ") == 4)
    send_sigterm(worker)
    assert ended(platform, worker) == 0
    assert short.status == "COMPLETED"
    assert {job.status for job in jobs} == {"FAILED"}
    assert refusals(jobs) == {("draining", True)}
    assert [job.chunks[-1]["status"] for job in jobs[:2]] == ["OVERLOADED"] * 2


def test_jobs_that_wait_for_the_model_are_refused(platform: Platform, start: Start) -> None:
    """Jobs that wait for a start longer than the drain are refused; a cancelled one is dropped."""
    worker = start("--drain-s", "1", "--start-s", "1000")
    jobs = [Client(platform).submit({"prompt": "3"}) for _ in range(3)]
    until(lambda: all(job.progress for job in jobs))
    cancelled = jobs.pop()
    Client(platform).cancel(cancelled)
    until(lambda: f"Job stopped: {cancelled.id}" in worker.log)
    send_sigterm(worker)
    assert ended(platform, worker) == 0
    assert refusals(jobs) == {("draining", True)}
    assert cancelled.num_results == 0


def test_jobs_of_the_open_poll_are_answered(platform: Platform, start: Start) -> None:
    """Jobs that one poll brings after SIGTERM run at the same time; the SDK would lose them."""
    worker = start("--drain-s", "60")
    num_polls = send_sigterm_in_a_poll(platform, worker)
    client = Client(platform)
    with platform.paused():
        late = [client.submit({"prompt": prompt}) for prompt in ("3", "3", "3", "hold")]
        late.append(client.submit({"prompt": "3", "stream": True}))
    assert ended(platform, worker) == 0
    assert [job.status for job in late] == ["COMPLETED"] * 5
    assert platform.queue.num_polls == num_polls


@pytest.mark.parametrize("drain_s", ["0", "1"])
def test_a_late_job_that_needs_longer_is_refused(
    platform: Platform, start: Start, drain_s: str
) -> None:
    """A late job has the rest of the drain; one that comes after the cut is refused at once."""
    worker = start("--drain-s", drain_s)
    send_sigterm_in_a_poll(platform, worker)
    job = Client(platform).submit({"prompt": "mute"})
    assert ended(platform, worker) == 0
    assert refusals([job]) == {("draining", True)}


def test_an_idle_worker_ends_when_its_poll_returns(platform: Platform, start: Start) -> None:
    """An idle worker waits for its open poll, which may bring a job, and then ends at once."""
    worker = start()
    send_sigterm_in_a_poll(platform, worker)
    assert platform.queue.num_open_polls == 1
    assert worker.process.poll() is None
    platform.end_polls()
    assert worker.process.wait(60) == 0
    settled(platform, worker)


def test_a_second_sigterm_changes_nothing(platform: Platform, start: Start) -> None:
    """A second and a third SIGTERM leave a running job its time."""
    worker = start("--drain-s", "60")
    job = Client(platform).submit({"prompt": "1000", "stream": True})
    until(lambda: job.chunks)
    send_sigterm(worker)
    for _ in range(2):
        num_chunks = len(job.chunks)
        until(lambda: len(job.chunks) > num_chunks)  # noqa: B023
        worker.process.send_signal(signal.SIGTERM)
    assert ended(platform, worker) == 0
    assert job.status == "COMPLETED"


def test_a_worker_can_end_itself(platform: Platform, start: Start) -> None:
    """`JobLoop.end` takes no more jobs, answers the running ones, and sets the exit code."""
    worker = start("--drain-s", "60")
    client = Client(platform)
    running = client.submit({"prompt": "500", "stream": True})
    until(lambda: running.chunks)
    last = client.submit({"prompt": "end 3"})
    assert ended(platform, worker) == 3
    assert (running.status, last.status) == ("COMPLETED", "COMPLETED")


def test_a_result_that_is_never_acknowledged_does_not_keep_the_worker(
    platform: Platform, start: Start
) -> None:
    """A result that is never acknowledged is posted until the drain is over, and then logged."""
    worker = start("--drain-s", "2")
    platform.faults.inject_always("job-done", 500)
    job = Client(platform).submit({"prompt": "3"})
    until(lambda: platform.faults.num_faults["job-done"])
    send_sigterm(worker)
    assert worker.process.wait(60) == 0
    assert f"job '{job.id}': the result could not be delivered in time" in worker.log
    until(lambda: not left_behind(worker.home))


def test_a_job_stopped_while_draining_is_dropped(platform: Platform, start: Start) -> None:
    """Stops are polled for while draining: a cancelled job does not keep the worker."""
    worker = start("--drain-s", "1000")
    job = Client(platform).submit({"prompt": "hold", "stream": True})
    until(lambda: job.chunks)
    send_sigterm(worker)
    Client(platform).cancel(job)
    assert ended(platform, worker) == 0
    assert (job.status, job.num_results) == ("CANCELLED", 0)
