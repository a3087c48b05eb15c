"""Reading a stream ahead, without delaying, losing or reordering anything."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from serve_app.errors import InternalError
from serve_app.worker.buffer import ItemBuffer


def test_the_first_item_is_not_held_back() -> None:
    """The first token is posted while the model still works on the second."""

    async def scenario() -> None:
        second = asyncio.Event()

        async def items() -> AsyncGenerator[dict[str, Any], None]:
            yield {"n": 1}
            await second.wait()
            yield {"n": 2}

        async with ItemBuffer(items()) as buffer:
            assert await buffer.take() == [{"n": 1}]
            assert not buffer.is_over
            second.set()
            assert await rest(buffer) == [{"n": 2}]

    asyncio.run(scenario())


def test_items_that_come_during_a_post_are_one_batch() -> None:
    """The model goes on while a post is under way; the next batch has all items of that time."""

    async def scenario() -> None:
        all_read = asyncio.Event()

        async def items() -> AsyncGenerator[dict[str, Any], None]:
            for n in range(100):
                yield {"n": n}
                await asyncio.sleep(0)
            all_read.set()

        async with ItemBuffer(items()) as buffer:
            first = await buffer.take()
            await all_read.wait()  # the consumer is busy with its post
            second = await buffer.take()
            assert first + second == [{"n": n} for n in range(100)]
            assert len(first) == 1
            assert await rest(buffer) == []

    asyncio.run(scenario())


def test_a_failure_is_raised_after_the_items_before_it() -> None:
    """Items that came before the stream failed are delivered, then the error is raised."""

    async def scenario() -> list[Any]:
        async def items() -> AsyncGenerator[dict[str, Any], None]:
            yield {"n": 1}
            yield {"n": 2}
            raise InternalError("broken")

        seen: list[Any] = []

        async def read() -> None:
            async with ItemBuffer(items()) as buffer:
                while not buffer.is_over:
                    seen.extend(await buffer.take())

        with pytest.raises(InternalError, match="broken"):
            await read()
        return seen

    assert asyncio.run(scenario()) == [{"n": 1}, {"n": 2}]


def test_leaving_closes_the_source() -> None:
    """Leaving the block, and the end of a task in the middle of it, both cancel the request."""

    async def scenario(is_cancelled: bool) -> bool:
        closed, begun = asyncio.Event(), asyncio.Event()

        async def items() -> AsyncGenerator[dict[str, Any], None]:
            try:
                yield {"n": 1}
                await asyncio.Event().wait()
            finally:
                closed.set()

        async def job() -> None:
            async with ItemBuffer(items()) as buffer:
                await buffer.take()
                begun.set()
                if is_cancelled:
                    await buffer.take()

        task = asyncio.create_task(job())
        await begun.wait()
        if is_cancelled:
            task.cancel()
        await asyncio.wait({task})
        assert task.cancelled() == is_cancelled
        return closed.is_set()

    assert asyncio.run(scenario(is_cancelled=False))
    assert asyncio.run(scenario(is_cancelled=True))


async def rest(buffer: ItemBuffer[Any]) -> list[dict[str, Any]]:
    """Returns all items up to the end."""
    seen: list[dict[str, Any]] = []
    while not buffer.is_over:
        seen.extend(await buffer.take())
    return seen
