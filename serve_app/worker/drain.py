"""Drain: limits the time of running jobs after SIGTERM.

    begin ---- running jobs finish ---- cut ---- the others are refused ---- over

A `Drain` belongs to one event loop; only that loop's thread may call it.
"""

import asyncio
import contextlib
import time

CUT_SHARE = 0.8
"""Share of the drain in which running jobs may finish. The rest is for posting refusals."""
MAX_SLEEP_S = 1.0
"""Maximum pause while draining, in seconds, so that the end is noticed."""


class Drain:
    """A drain of `limit_s` seconds, from `begin` until the worker stops waiting."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self.begun = asyncio.Event()
        self._began = 0.0

    def begin(self) -> None:
        """Starts the drain; a second call changes nothing."""
        if not self.begun.is_set():
            self._began = time.monotonic()
            self.begun.set()

    @property
    def is_cut(self) -> bool:
        """Whether the remaining running jobs must be refused."""
        return self._has_passed(CUT_SHARE)

    @property
    def is_over(self) -> bool:
        """Whether the worker stops waiting for refusals to be posted."""
        return self._has_passed(1.0)

    async def sleep(self, seconds: float) -> None:
        """Sleeps until `seconds` have passed or the drain begins; at most 1 s while draining."""
        if self.begun.is_set():
            await asyncio.sleep(min(seconds, MAX_SLEEP_S))
        else:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self.begun.wait()

    def _has_passed(self, share: float) -> bool:
        return self.begun.is_set() and time.monotonic() - self._began >= self.limit_s * share
