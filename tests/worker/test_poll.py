"""Polls for jobs that go wrong, and jobs that come in odd ways."""

import json
from pathlib import Path
from typing import Any

import pytest

from emulator.faults import HTML, NOT_JSON, RESET, Fault
from emulator.platform import Platform
from emulator.worker import Worker
from serve_app.errors import InvalidRequest
from serve_app.worker.job import parse
from serve_app.worker.poll import poll_for_jobs
from tests.settled import settled
from tests.worker.conftest import SCRIPT, Client, until

BEGINS, ENDS = "Polls for jobs fail", "Polls for jobs work again"
ODD = [Fault(body=json.dumps(value).encode()) for value in (None, 5, [3, None], {"no": "id"})]


@pytest.mark.parametrize("odd", ["[" * 9_999 + "]" * 9_999, "1" * 5_000, '"\xff"', r'"\ud800"'])
def test_odd_inputs_cost_no_other_job(odd: str) -> None:
    """What Python would not read is still a job of its batch, to be refused alone."""
    body = f'[{{"id": "a", "input": {odd}}}, {{"id": "b", "input": 1}}]'.encode("latin-1")
    assert [job["id"] for job in poll_for_jobs().items(200, body)] == ["a", "b"]


@pytest.mark.parametrize("odd", ["[" * 9_999 + "]" * 9_999, "1" * 5_000])
def test_odd_inputs_are_refused(odd: str) -> None:
    """The client hears what is wrong with it."""
    (job,) = poll_for_jobs().items(200, f'{{"id": "a", "input": {{"prompt": {odd}}}}}'.encode())
    with pytest.raises(InvalidRequest, match="JSON"):
        parse(job, "r1", 1_000_000)


def trouble(log: str) -> tuple[int, int]:
    """How often the log says that polls fail, and that they work again."""
    return log.count(BEGINS), log.count(ENDS)


@pytest.mark.parametrize("fault", [500, 429, 404, RESET, NOT_JSON, HTML], ids=str)
def test_a_take_that_fails_is_said_once(
    scripted: Client, scripted_worker: Worker, fault: int | Fault
) -> None:
    """One line when it begins and one when it is over; the next job is answered."""
    before = trouble(scripted_worker.log)
    num_faults = 1 if fault == 429 else 2  # after a 429, five seconds pass
    scripted.platform.faults.inject("job-take", *[fault] * num_faults)
    until(lambda: scripted.platform.faults.num_planned == 0)
    assert scripted.ended({"prompt": "3"}).status == "COMPLETED"
    until(lambda: trouble(scripted_worker.log) == (before[0] + 1, before[1] + 1))


@pytest.mark.parametrize("fault", [204, 400, *ODD], ids=str)
def test_a_take_that_brings_no_job_is_no_trouble(
    scripted: Client, scripted_worker: Worker, fault: int | Fault
) -> None:
    """Such as RunPod's 400 after a thaw; what has no id is passed over."""
    scripted.platform.faults.inject("job-take", fault, fault)
    until(lambda: scripted.platform.faults.num_planned == 0)
    assert scripted.ended({"prompt": "3"}).status == "COMPLETED"


@pytest.mark.parametrize("fault", [204, 400, 500, RESET], ids=str)
def test_polls_keep_their_pace(scripted: Client, fault: int | Fault) -> None:
    """A platform that answers at once is asked a few times between two heartbeats, no more."""
    platform = scripted.platform
    platform.faults.inject_always("job-take", fault)
    num_pings, num_polls = len(platform.queue.pings), platform.faults.num_requests["job-take"]
    until(lambda: len(platform.queue.pings) >= num_pings + 2)  # one a second
    assert platform.faults.num_requests["job-take"] - num_polls < 20


def test_a_job_without_input_is_answered_alone(tmp_path: Path) -> None:
    """Taken one at a time, where the SDK itself would raise before any handler runs."""
    with (
        Platform() as platform,
        Worker(platform, tmp_path, script=SCRIPT, arguments=["--slots", "1"]) as worker,
    ):
        client = Client(platform)
        job = client.post({})
        until(lambda: job.is_over)
        assert client.error_of(job)["error"]["param"] == "input"
        assert client.ended({"prompt": "3"}).status == "COMPLETED"
        assert platform.queue.last_limit == 1
        settled(platform, worker)


@pytest.mark.parametrize("more", [{"self": 1}, {"webhook": None, "policy": {"ttl": 5}}])
def test_other_fields_of_a_job_are_no_accident(scripted: Client, more: dict[str, Any]) -> None:
    """The SDK passes them as keyword arguments, where a name can be taken."""
    job = scripted.post({"input": {"prompt": "3"}, **more})
    until(lambda: job.is_over)
    assert job.status == "COMPLETED"


def test_a_job_that_comes_again_while_it_runs(scripted: Client, scripted_worker: Worker) -> None:
    """It is run once: no token twice, one result."""
    num_calls = scripted_worker.log.count("\ncall ")
    job = scripted.submit({"prompt": "1500", "stream": True})
    until(lambda: job.chunks)
    scripted.platform.deliver_again(job)
    until(lambda: job.is_over and job.num_deliveries == 2)
    text = "".join(chunk["token"] for chunk in job.chunks)
    assert text == "".join(f"{n} " for n in range(1500))
    assert scripted_worker.log.count("\ncall ") == num_calls + 1


def test_a_job_that_comes_twice_in_one_batch(scripted: Client) -> None:
    """The same, for one take that brings both."""
    with scripted.platform.paused():
        job = scripted.submit({"prompt": "3"})
        scripted.platform.deliver_again(job)
    other = scripted.ended({"prompt": "3"})
    until(lambda: job.is_over and job.num_deliveries == 2)
    assert (job.status, other.status) == ("COMPLETED", "COMPLETED")


def test_an_echo_of_an_answered_job_is_not_run(scripted: Client, scripted_worker: Worker) -> None:
    """A moment after its result was acknowledged; then the worker goes on."""
    job = scripted.ended({"prompt": "3"})
    num_calls = scripted_worker.log.count("\ncall ")
    scripted.platform.deliver_again(job)
    until(lambda: job.num_deliveries == 2)
    until(lambda: f"job '{job.id}' came twice" in scripted_worker.log)
    assert scripted_worker.log.count("\ncall ") == num_calls


def test_a_failed_job_that_is_sent_again_is_run(scripted: Client) -> None:
    """`/retry` sends a job under its old id, and is no echo."""
    job = scripted.ended({"prompt": "flaky"})
    assert job.status == "FAILED"
    scripted.retry(job)
    until(lambda: job.is_over)
    assert job.status == "COMPLETED"


def test_a_full_worker_takes_a_job_for_each_that_ends(scripted: Client) -> None:
    """It never has more than its places, nor asks for any while it is full."""
    queue = scripted.platform.queue
    held = [scripted.submit({"prompt": "hold", "stream": True}) for _ in range(9)]
    until(lambda: sum(bool(job.chunks) for job in held) == 8)
    until(lambda: queue.num_open_polls == 0)
    assert [job.status for job in held].count("IN_QUEUE") == 1
    first = next(job for job in held if job.chunks)
    scripted.cancel(first)
    until(lambda: sum(bool(job.chunks) for job in held) == 9)
    assert queue.last_limit == 1
    for job in held:
        scripted.cancel(job)
    until(lambda: queue.last_limit == 8)
