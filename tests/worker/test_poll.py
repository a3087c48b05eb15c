"""Polls that fail, and jobs that are odd, come twice or come to a full worker."""

import json
from pathlib import Path
from typing import Any

import pytest

from emulator.faults import HTML, NOT_JSON, RESET, Fault
from emulator.platform import Platform
from emulator.worker import Worker
from serve_app.errors import InvalidRequest
from serve_app.worker.job import parse
from serve_app.worker.poll import poll_for_jobs, poll_for_stops
from tests.settled import settled
from tests.worker.conftest import SCRIPT, Client, until

BEGINS, ENDS = "Polls for jobs fail", "Polls for jobs work again"
ODD = [Fault(body=json.dumps(value).encode()) for value in (None, 5, [3, None], {"no": "id"})]


@pytest.mark.parametrize("odd", ["[" * 9_999 + "]" * 9_999, "1" * 5_000, '"\xff"', r'"\ud800"'])
def test_odd_inputs_do_not_harm_their_batch(odd: str) -> None:
    """JSON that Python's defaults refuse still gives the jobs of its batch."""
    body = f'[{{"id": "a", "input": {odd}}}, {{"id": "b", "input": 1}}]'.encode("latin-1")
    assert [job["id"] for job in poll_for_jobs().items(200, body)] == ["a", "b"]


@pytest.mark.parametrize("odd", ["[" * 9_999 + "]" * 9_999, "1" * 5_000])
def test_odd_inputs_are_refused(odd: str) -> None:
    """A job with such an input is refused on its own."""
    (job,) = poll_for_jobs().items(200, f'{{"id": "a", "input": {{"prompt": {odd}}}}}'.encode())
    with pytest.raises(InvalidRequest, match="JSON"):
        parse(job, "r1", 1_000_000)


def test_stops_are_job_ids() -> None:
    """Ids that are no strings are dropped; a 204 names none."""
    body = b'{"jobsToStop": ["a", 1, null, "b"]}'
    assert poll_for_stops().items(200, body) == ["a", "b"]
    assert poll_for_stops().items(204, b"") == []


@pytest.mark.parametrize("body", [b"[]", b"null", b'{"jobsToStop": "a"}', b'["a"]', b"{"])
def test_an_odd_answer_stops_no_job(body: bytes) -> None:
    """An answer in another form is a failed poll, which is repeated later."""
    with pytest.raises(ValueError, match="the answer"):
        poll_for_stops().items(200, body)


def outages(log: str) -> tuple[int, int]:
    """Returns how often the log says that polls begin to fail, and that they work again."""
    return log.count(BEGINS), log.count(ENDS)


@pytest.mark.parametrize("fault", [500, 429, 404, RESET, NOT_JSON, HTML], ids=str)
def test_an_outage_is_logged_once(
    scripted: Client, scripted_worker: Worker, fault: int | Fault
) -> None:
    """An outage is one log line at its begin and one at its end; the next job is answered."""
    before = outages(scripted_worker.log)
    scripted.platform.faults.inject("job-take", fault, fault)
    until(lambda: scripted.platform.faults.num_planned == 0)
    assert scripted.ended({"prompt": "3"}).status == "COMPLETED"
    until(lambda: outages(scripted_worker.log) == (before[0] + 1, before[1] + 1))


@pytest.mark.parametrize("fault", [204, 400, *ODD], ids=str)
def test_an_answer_without_a_job_is_skipped(
    scripted: Client, scripted_worker: Worker, fault: int | Fault
) -> None:
    """Answers without a usable job, such as RunPod's 400 after a thaw, harm no later job."""
    scripted.platform.faults.inject("job-take", fault, fault)
    until(lambda: scripted.platform.faults.num_planned == 0)
    assert scripted.ended({"prompt": "3"}).status == "COMPLETED"


@pytest.mark.parametrize("fault", [204, 400, 500, RESET], ids=str)
def test_polls_keep_their_pace(scripted: Client, fault: int | Fault) -> None:
    """A platform that answers at once gets a poll each `MIN_POLL_S`: 20 in the second from one
    ping to the next, and not thousands."""
    platform = scripted.platform
    platform.faults.inject_always("job-take", fault)
    num_pings, num_polls = len(platform.queue.pings), platform.faults.num_requests["job-take"]
    until(lambda: len(platform.queue.pings) > num_pings)  # one a second
    assert platform.faults.num_requests["job-take"] - num_polls < 100


def test_a_job_without_input_is_answered_alone(tmp_path: Path) -> None:
    """A lone job without `input` is answered; the SDK would raise before any handler."""
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


@pytest.mark.parametrize("more", [{"self": 1}, {"webhook": None, "policy": {"ttl": 60_000}}])
def test_other_fields_of_a_job_are_ignored(scripted: Client, more: dict[str, Any]) -> None:
    """Other fields of a job, `self` too, are ignored; the SDK takes them as keyword arguments."""
    job = scripted.post({"input": {"prompt": "3"}, **more})
    until(lambda: job.is_over)
    assert job.status == "COMPLETED"


def test_a_full_worker_takes_a_job_for_each_that_ends(scripted: Client) -> None:
    """A full worker does not poll, and takes one job for each that ends."""
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
