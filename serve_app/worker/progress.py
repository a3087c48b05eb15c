"""Progress updates, told to a job while it waits.

They go to the address of the job's result, where a late one would overwrite it: each is awaited,
and none is under way when the wait is over. Knows not what they say.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")
Tell = Callable[[dict[str, Any], dict[str, Any]], Awaitable[None]]
"""Tells one job one progress update: (job, update)."""

TELL_TIMEOUT_S = 5.0
"""A result is worth more than news of its coming."""


async def while_waiting(
    wait: Awaitable[T], tell: Callable[[], Awaitable[None]], interval_s: float
) -> T:
    """The result of `wait`, telling at once and then every `interval_s` seconds until it is there.

    When this returns or raises, no update is under way.
    """
    task = asyncio.ensure_future(wait)
    try:
        await asyncio.sleep(0)  # what fails or succeeds at once is no news
        while not task.done():
            try:
                # Not `wait_for`, which in Python 3.11 may lose a cancellation.
                async with asyncio.timeout(TELL_TIMEOUT_S):
                    await tell()
            except Exception as error:  # the job goes on without the news
                log.warning("A progress update failed: %s", type(error).__name__)
            await asyncio.wait({task}, timeout=interval_s)
        return task.result()
    finally:
        task.cancel()
        await asyncio.wait({task})  # so that it has let go of what it held


async def post(job: dict[str, Any], update: dict[str, Any]) -> None:
    """Posts one update through the SDK and waits until the platform has it."""
    # The SDK's public progress_update posts from a thread of its own, in no order and after
    # the result if it is slow; this is what that thread runs.
    from runpod.http_client import AsyncClientSession
    from runpod.serverless.modules.rp_http import send_result

    async with AsyncClientSession() as session:
        await send_result(session, {"status": "IN_PROGRESS", "output": update}, job)
