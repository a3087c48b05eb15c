"""The worker that handlers in guides make: a yield, and so a post, for every chunk.

`runpod_entry.py` in all else, so that only the delivery differs.
"""

import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import runpod_entry
from serve_app.worker import handler


async def one_by_one(
    items: AsyncGenerator[dict[str, Any], None],
) -> AsyncGenerator[list[dict[str, Any]], None]:
    """Stands for `delivery.batches`: the next item is taken when the last one was posted."""
    async with aclosing(items):
        async for item in items:
            yield [item]


if __name__ == "__main__":
    handler.batches = one_by_one  # type: ignore[attr-defined]
    sys.exit(runpod_entry.main())
