"""Posts progress updates while a job waits.

An update is posted to the URL of the job's result, so a late update would overwrite the result.
Therefore each update is awaited, and none is in progress when the wait ends.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

UPDATE_TIMEOUT_S = 5.0
"""Timeout of one update in seconds, because the job's result may have to wait for it."""


async def while_waiting(
    wait: Awaitable[T], update: Callable[[], Awaitable[None]], interval_s: float
) -> T:
    """Returns the result of `wait`. Until then, awaits `update` at once and every `interval_s`
    seconds.

    When this returns or raises, no update is running. A failed update is logged.
    """
    task = asyncio.ensure_future(wait)
    try:
        await asyncio.sleep(0)  # a `wait` that ends at once needs no update
        while not task.done():
            try:
                # Not `wait_for`, which in Python 3.11 may lose a cancellation.
                async with asyncio.timeout(UPDATE_TIMEOUT_S):
                    await update()
            except Exception as error:
                log.warning("A progress update failed: %s", type(error).__name__)
            await asyncio.wait({task}, timeout=interval_s)
        return task.result()
    finally:
        task.cancel()
        await asyncio.wait({task})  # until it has released what it holds
