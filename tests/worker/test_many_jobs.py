"""200 jobs at once, more than the worker takes, through the real SDK, Ray and the tiny model."""

import heapq
import itertools
from typing import Any

import pytest

from emulator.queue import Job
from serve_app.config.settings import Settings
from serve_app.worker.start import num_slots
from tests.worker.conftest import TINY, Client, until

pytestmark = pytest.mark.ray

NUM_JOBS = 200
QUESTIONS = [f"What is {a} + {b}?" for a, b in itertools.product(range(2, 7), range(1, 5))]


def question(number: int) -> dict[str, Any]:
    """Returns the input of job `number`; every second one streams."""
    prompt = QUESTIONS[number // 2 % len(QUESTIONS)]
    return {"prompt": prompt, "temperature": 0, "max_tokens": 12, "stream": number % 2 == 1}


def text_of(job: Job) -> str:
    """Returns the job's answer; the text of all chunks for a stream."""
    assert job.status == "COMPLETED", job.error
    if isinstance(job.output, dict):
        return str(job.output["text"])
    return "".join(chunk["token"] for chunk in job.output)


def max_at_once(jobs: list[Job]) -> int:
    """Returns the largest number of jobs that the worker had taken and not yet answered."""
    ends: list[float] = []
    num_max = 0
    for started, ended in sorted((job.started or 0.0, job.ended or 0.0) for job in jobs):
        while ends and ends[0] <= started:
            heapq.heappop(ends)
        heapq.heappush(ends, ended)
        num_max = max(num_max, len(ends))
    return num_max


def max_overtaken(jobs: list[Job]) -> int:
    """Returns the largest number of later jobs that ended before one job."""
    ends = [job.ended or 0.0 for job in jobs]
    return max(sum(later < end for later in ends[n + 1 :]) for n, end in enumerate(ends))


def test_two_hundred_jobs_at_once(client: Client) -> None:
    """All jobs get their own answer once; jobs beyond the slots stay in the platform's queue."""
    alone = [client.ended(question(2 * n)) for n in range(len(QUESTIONS))]
    right = [text_of(job) for job in alone]
    assert len(set(right)) > len(QUESTIONS) / 4, "the answers do not differ enough between jobs"
    with client.platform.paused():
        jobs = [client.submit(question(number)) for number in range(NUM_JOBS)]
    until(lambda: all(job.is_over for job in jobs))
    for number, job in enumerate(jobs):
        assert text_of(job) == right[number // 2 % len(QUESTIONS)]
        assert (job.num_results, job.num_deliveries, job.num_late_posts) == (1, 1, 0)
    slots = num_slots(Settings.from_yaml(TINY))
    assert max_at_once(jobs) == slots
    assert max_overtaken(jobs) < slots
    engine = client.ended({"endpoint": "/health"}).output["engine"]
    assert (engine["running"], engine["waiting"], engine["kv_blocks_used"]) == (0, 0, 0)
