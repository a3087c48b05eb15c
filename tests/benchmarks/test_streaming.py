"""The streaming benchmark and the worker that it compares ours with."""

import asyncio
from argparse import Namespace
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from benchmarks.per_chunk_worker import OneByOne
from benchmarks.streaming import measure
from emulator.endpoint import endpoint
from serve_app.worker import buffer, handler

TOKENS = 20


@pytest.mark.ray
def test_its_figures_are_those_of_the_jobs() -> None:
    """The benchmark counts all tokens and posts of its streams, on a platform with a delay."""
    with endpoint() as place:
        figures = measure(place, 0.05, 2, Namespace(rounds=2, tokens=TOKENS))
        jobs = list(place.platform.queue.jobs.values())
    assert len(jobs) == 4
    num_posts = sum(len(job.chunks) for job in jobs)
    assert figures["posts_per_100_tokens"] == round(100 * num_posts / (4 * TOKENS), 1)
    assert (figures["post_ms"], figures["streams"]) == (50, 2)
    slowest = max((job.ended or 0) - (job.started or 0) for job in jobs)
    assert figures["tokens_per_s"] >= 2 * TOKENS / slowest - 0.1
    assert figures["first_token_ms"] < 1000 * slowest


def test_its_peer_posts_every_chunk_alone() -> None:
    """The peer puts its own buffer, which takes one item at a time, in the place of ours."""
    assert handler.ItemBuffer is buffer.ItemBuffer  # type: ignore[attr-defined]

    async def items() -> AsyncGenerator[dict[str, Any], None]:
        for n in range(3):
            yield {"n": n}

    async def posted() -> list[Any]:
        async with OneByOne(items()) as buffer:
            batches = []
            while not buffer.is_over:
                batches.append(await buffer.take())
            return batches

    assert asyncio.run(posted()) == [[{"n": 0}], [{"n": 1}], [{"n": 2}], []]
