"""The worker that handlers in guides make: every chunk is a post of its own.

It is `runpod_entry.py` in everything else, so that only the delivery differs.
"""

import sys

import runpod_entry
from serve_app.worker import handler
from serve_app.worker.buffer import Item, ItemBuffer


class OneByOne(ItemBuffer[Item]):
    """Stands for `ItemBuffer`: takes the next item when the last one was posted."""

    async def __aenter__(self) -> "OneByOne[Item]":
        self._is_over = False
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._items.aclose()

    @property
    def is_over(self) -> bool:
        return self._is_over

    async def take(self) -> list[Item]:
        try:
            return [await anext(self._items)]
        except StopAsyncIteration:
            self._is_over = True
            return []


if __name__ == "__main__":
    handler.ItemBuffer = OneByOne  # type: ignore[attr-defined]
    sys.exit(runpod_entry.main())
