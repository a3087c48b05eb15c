"""The worker that the streaming benchmark compares ours with."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from benchmarks.per_chunk_worker import OneByOne
from serve_app.worker import buffer, handler


def test_its_peer_posts_every_chunk_alone() -> None:
    """The peer uses its own buffer, which returns one item at a time, instead of ours."""
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
