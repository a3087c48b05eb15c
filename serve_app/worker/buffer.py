"""Reads a stream of items ahead, so that the model never waits for a post to the platform."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Generic, Self, TypeVar

Item = TypeVar("Item")


class ItemBuffer(Generic[Item]):
    """Reads `items` in a task; `take` returns all items since the last call.

        async with ItemBuffer(client(call)) as buffer:
            while not buffer.is_over:
                batch = await buffer.take()

    Leaving the block closes `items`, which cancels the request.
    """

    def __init__(self, items: AsyncGenerator[Item, None]) -> None:
        self._items = items
        self._waiting: list[Item] = []
        self._changed = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._reading = asyncio.create_task(self._read())
        self._reading.add_done_callback(lambda _: self._changed.set())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._reading.cancel()
        await asyncio.wait({self._reading})

    @property
    def is_over(self) -> bool:
        """Whether every item was taken and no failure is left to raise."""
        is_read = self._reading.done() and not self._waiting
        return is_read and not self._reading.cancelled() and self._reading.exception() is None

    async def take(self) -> list[Item]:
        """Waits for an item. Returns all new items, or [] at the end.

        Raises the error that ended the stream, after all items before it.
        """
        await self._changed.wait()
        self._changed.clear()
        batch, self._waiting = self._waiting, []
        if not batch and self._reading.done():
            self._reading.result()
        if self._reading.done():
            self._changed.set()
        return batch

    async def _read(self) -> None:
        async with contextlib.aclosing(self._items):
            async for item in self._items:
                self._waiting.append(item)
                self._changed.set()
