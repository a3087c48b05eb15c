"""Jobs that the platform stops before, during and after their run."""

import pytest

from emulator.worker import Worker
from tests.worker.conftest import Client, until

SLOTS = 8


def is_idle(client: Client) -> bool:
    """Returns the last poll asked for a job for every slot."""
    return client.platform.queue.last_limit == SLOTS


@pytest.mark.parametrize(("prompt", "stream"), [("mute", False), ("mute", True), ("hold", True)])
def test_a_stopped_job_frees_its_call(
    scripted: Client, scripted_worker: Worker, prompt: str, stream: bool
) -> None:
    """A job stopped before or after its first token closes its call and posts nothing."""
    num_calls = scripted_worker.log.count("\ncall ")
    job = scripted.submit({"prompt": prompt, "stream": stream})
    until(lambda: scripted_worker.log.count("\ncall ") > num_calls)
    scripted.cancel(job)
    until(lambda: scripted_worker.log.count("\nclosed ") > num_calls)
    assert (job.status, job.num_results) == ("CANCELLED", 0)
    until(lambda: is_idle(scripted))


def test_jobs_stopped_as_they_are_taken_leak_no_slot(scripted: Client) -> None:
    """Jobs stopped before, while or just after they are taken free their slots."""
    scripted.platform.queue.num_cancels_at_take = 30
    for _ in range(30):
        scripted.submit({"prompt": "mute"})
    until(lambda: all(job.status == "CANCELLED" for job in scripted.platform.queue.jobs.values()))
    until(lambda: is_idle(scripted))
    assert scripted.ended({"prompt": "3"}).status == "COMPLETED"


def test_a_stop_after_the_answer_changes_nothing(scripted: Client) -> None:
    """A stop after the result changes neither the job nor the next one."""
    job = scripted.ended({"prompt": "3"})
    scripted.platform.stop_again(job)
    assert scripted.ended({"prompt": "3"}).status == "COMPLETED"
    assert (job.status, job.num_results, job.num_late_posts) == ("COMPLETED", 1, 0)


def test_a_job_whose_stop_came_first_is_refused(scripted: Client) -> None:
    """The job is refused with `retry`, as the stop may have been for an earlier delivery."""
    platform = scripted.platform
    with platform.paused():
        job = scripted.submit({"prompt": "3"})
        num_stops = platform.faults.num_requests["job-stop"]
        platform.stop_again(job)
        until(lambda: platform.faults.num_requests["job-stop"] > num_stops)
    scripted.ended({"prompt": "3"})
    until(lambda: job.is_over)
    error = scripted.error_of(job)["error"]
    assert "stopped" in error["message"]
    assert error["retry"]


def test_stops_work_after_faults(scripted: Client, scripted_worker: Worker) -> None:
    """After failed polls for stops a job can be stopped again."""
    scripted.platform.faults.inject("job-stop", 500, 429)
    until(lambda: scripted.platform.faults.num_planned == 0)
    job = scripted.submit({"prompt": "hold", "stream": True})
    until(lambda: job.chunks)
    scripted.cancel(job)
    until(lambda: is_idle(scripted))
