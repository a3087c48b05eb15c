"""Jobs that the platform delivers again: by mistake, or because a client retries them."""

import pytest

from emulator.faults import HELD, RESET, Fault
from emulator.policy import Policy
from emulator.worker import Worker
from tests.worker.conftest import Client, until


def test_a_job_that_comes_again_while_it_runs(scripted: Client, scripted_worker: Worker) -> None:
    """A job that comes again while it runs is run once, with one result."""
    num_calls = scripted_worker.log.count("\ncall ")
    job = scripted.submit({"prompt": "1500", "stream": True})
    until(lambda: job.chunks)
    scripted.platform.deliver_again(job)
    until(lambda: job.is_over and job.num_deliveries == 2)
    text = "".join(chunk["token"] for chunk in job.chunks)
    assert text == "".join(f"{n} " for n in range(1500))
    assert scripted_worker.log.count("\ncall ") == num_calls + 1


def test_a_job_that_comes_twice_in_one_batch(scripted: Client) -> None:
    """A job that is twice in one batch is run once."""
    with scripted.platform.paused():
        job = scripted.submit({"prompt": "3"})
        scripted.platform.deliver_again(job)
    other = scripted.ended({"prompt": "3"})
    until(lambda: job.is_over and job.num_deliveries == 2)
    assert (job.status, other.status) == ("COMPLETED", "COMPLETED")


def test_a_late_delivery_of_an_answer_is_dropped(scripted: Client, scripted_worker: Worker) -> None:
    """A delivery just after the result was acknowledged is dropped."""
    job = scripted.ended({"prompt": "3"})
    num_calls = scripted_worker.log.count("\ncall ")
    scripted.platform.deliver_again(job)
    until(lambda: job.num_deliveries == 2)
    until(lambda: f"job '{job.id}' was delivered again after its answer" in scripted_worker.log)
    assert scripted_worker.log.count("\ncall ") == num_calls


def test_a_failed_job_that_is_sent_again_is_run(scripted: Client) -> None:
    """`/retry` sends a failed job under its old id, and it is run."""
    job = scripted.ended({"prompt": "flaky 1"})
    assert job.status == "FAILED"
    scripted.retry(job)
    until(lambda: job.is_over)
    assert job.status == "COMPLETED"


def test_a_retry_before_the_failure_is_acknowledged_is_run(
    scripted: Client, scripted_worker: Worker
) -> None:
    """A retried job runs at once although the post of its failure is still unacknowledged."""
    num_calls = scripted_worker.log.count("\ncall ")
    scripted.platform.faults.delay_s["job-done"] = 1000
    job = scripted.ended({"prompt": "refused"})
    assert job.status == "FAILED"
    scripted.platform.faults.clear()
    scripted.retry(job)
    until(lambda: job.num_results)
    assert (job.status, job.num_deliveries, job.num_late_posts) == ("FAILED", 2, 0)
    assert scripted_worker.log.count("\ncall ") == num_calls + 2


@pytest.mark.parametrize("fault", [500, RESET, HELD])
def test_a_failure_is_not_posted_to_its_retry(scripted: Client, fault: int | Fault) -> None:
    """A failure whose acknowledgement is lost does not end the retried job."""
    scripted.platform.faults.delay_s["job-done"] = 1000
    job = scripted.ended({"prompt": f"flaky {fault}"})
    scripted.platform.faults.clear()
    scripted.platform.faults.inject("job-done", fault)
    scripted.retry(job)
    until(lambda: job.num_results)
    assert (job.status, job.num_results, job.num_late_posts) == ("COMPLETED", 1, 0)


def test_a_retry_that_comes_before_the_stop_is_run(
    scripted: Client, scripted_worker: Worker
) -> None:
    """A job that has timed out and is retried runs again, although its stop comes later."""
    platform = scripted.platform
    num_calls = scripted_worker.log.count("\ncall ")
    job = scripted.submit({"prompt": "hold", "stream": True})
    until(lambda: job.chunks)
    num_outages = scripted_worker.log.count("Polls for stops fail")
    platform.faults.inject_always("job-stop", 500)
    # A poll that is open since before the fault would still bring the stop.
    until(lambda: scripted_worker.log.count("Polls for stops fail") > num_outages)
    job.policy = Policy(execution_timeout_s=0.1)
    until(lambda: job.status == "TIMED_OUT")
    job.policy = Policy()
    scripted.retry(job)
    until(lambda: f"job '{job.id}' was delivered twice" in scripted_worker.log)
    platform.faults.clear()
    until(lambda: scripted_worker.log.count("\ncall ") == num_calls + 2)
    scripted.cancel(job)


def test_a_retry_after_a_late_answer_and_its_stop_is_run(
    scripted: Client, scripted_worker: Worker
) -> None:
    """A stop after the answer says that the platform did not take it, so a retry is run."""
    job = scripted.ended({"prompt": "3"})
    num_calls = scripted_worker.log.count("\ncall ")
    num_stops = scripted.platform.faults.num_requests["job-stop"]
    scripted.platform.stop_again(job)
    until(lambda: scripted.platform.faults.num_requests["job-stop"] > num_stops)
    job.status = "TIMED_OUT"  # as where the platform's time limit passed first
    scripted.retry(job)
    until(lambda: job.num_results)
    assert scripted_worker.log.count("\ncall ") == num_calls + 1
