"""Jobs in flight, without a platform."""

import asyncio
from typing import Any

import pytest

from serve_app.worker.in_flight import InFlightJobs


def test_two_stops_cancel_a_job_once() -> None:
    """A second stop leaves the job the time to release what it holds."""

    async def scenario() -> bool:
        jobs = InFlightJobs()
        (job,) = jobs.accept([{"id": "job-1", "input": {}}])
        begun, may_close = asyncio.Event(), asyncio.Event()
        is_closed = False

        async def work() -> None:
            nonlocal is_closed
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                await may_close.wait()
                is_closed = True

        job.task = asyncio.create_task(work())
        await begun.wait()
        for _ in range(2):
            jobs.stop("job-1")
            await asyncio.sleep(0)
        may_close.set()
        await asyncio.wait({job.task})
        return is_closed

    assert asyncio.run(scenario())


@pytest.mark.parametrize("comes_first", ["retry", "acknowledgement"])
def test_a_retry_between_a_late_output_and_its_stop_runs(comes_first: str) -> None:
    """A job that timed out answers late and is retried; the stop comes last, and the retry runs."""
    jobs = InFlightJobs()
    given = {"id": "job-1", "input": {}}
    (job,) = jobs.accept([given])
    job.answering()
    if comes_first == "retry":
        assert jobs.accept([given]) == []
    job.is_output_acknowledged = True
    assert jobs.close(job) == []
    if comes_first == "acknowledgement":
        assert jobs.accept([given]) == []
    assert jobs.stop("job-1") == [given]
    assert len(jobs.accept([given])) == 1


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"prompts": ["a"] * 100}, 100),
        ({"items": [{"prompt": "a"}] * 7}, 7),
        ({"endpoint": "/prompt", "data": {"prompts": ["a", "b"]}}, 2),
        ({"route": "/v1/completions", "body": {"prompt": [[1, 2], [3]]}}, 2),
        ({"openai_route": "/v1/completions", "openai_input": {"prompt": ["a"] * 5}}, 5),
        ({"openai_route": "/v1/completions", "openai_input": {"prompt": [1, 2, 3]}}, 1),
        ({"prompt": "a"}, 1),
        ({"prompts": []}, 1),
        ({"prompts": "a"}, 1),
        (None, 1),
    ],
)
def test_a_job_counts_as_many_as_its_list_has_prompts(given: Any, expected: int) -> None:
    """A job counts the prompts of its list in every form of input, and as 1 in any other."""
    jobs = InFlightJobs()
    jobs.accept([{"id": "job-1", "input": given}])
    assert jobs.num_prompts == expected


def test_lists_leave_jobs_with_the_platform() -> None:
    """The worker asks for fewer jobs while lists run, and for none when the prompts are enough."""
    jobs = InFlightJobs()
    assert jobs.may_take(96) == 96
    jobs.accept([{"id": "1", "input": {"prompt": "a"}}])
    assert jobs.may_take(96) == 95
    jobs.accept([{"id": "2", "input": {"prompts": ["a"] * 30}}])
    assert jobs.may_take(96) == 2
    (big,) = jobs.accept([{"id": "3", "input": {"prompts": ["a"] * 100}}])
    assert jobs.may_take(96) == 0
    jobs.close(big)
    assert jobs.may_take(96) == 2
