"""The streaming benchmark, on the worker that the tests share."""

from argparse import Namespace

import pytest

from benchmarks.streaming import measure
from emulator.endpoint import Endpoint
from emulator.platform import Platform
from emulator.queue import Job
from emulator.worker import Worker

pytestmark = pytest.mark.ray

TOKENS = 20


def test_its_figures_are_those_of_the_jobs(
    tiny_platform: Platform, tiny_worker: Worker, first_jobs: list[Job]
) -> None:
    """The benchmark counts all tokens and posts of its streams, on a platform with a delay."""
    before = set(tiny_platform.queue.jobs)
    place = Endpoint(tiny_platform, tiny_worker)
    try:
        figures = measure(place, 0.05, 2, Namespace(rounds=2, tokens=TOKENS))
    finally:
        tiny_platform.faults.clear()
    jobs = [job for id, job in tiny_platform.queue.jobs.items() if id not in before]
    assert len(jobs) == 4
    num_posts = sum(len(job.chunks) for job in jobs)
    assert figures["posts_per_100_tokens"] == round(100 * num_posts / (4 * TOKENS), 1)
    assert (figures["post_ms"], figures["streams"]) == (50, 2)
    slowest = max((job.ended or 0) - (job.started or 0) for job in jobs)
    assert figures["tokens_per_s"] >= 2 * TOKENS / slowest - 0.1
    assert figures["first_token_ms"] < 1000 * slowest
