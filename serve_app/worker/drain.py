"""The end of a worker: when it began, and how much time it leaves to what still runs.

    began ---- running jobs finish ---- cut ---- the rest is told to come again ---- over

Knows only the clock. Lives in one event loop, whose thread makes every call.
"""

import asyncio
import contextlib
import time

CUT_SHARE = 0.8
"""The part of the time that running jobs have; in the rest those that are cut off are told so."""


class Drain:
    """At most `limit_s` seconds from `begin` until nobody is waited for any longer."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self.begun = asyncio.Event()
        self._began = 0.0

    def begin(self) -> None:
        """Starts the clock; a second call changes nothing."""
        if not self.begun.is_set():
            self._began = time.monotonic()
            self.begun.set()

    @property
    def is_cut(self) -> bool:
        """Jobs that still run are refused from now on."""
        return self._share(CUT_SHARE)

    @property
    def is_over(self) -> bool:
        """Not even a refusal is waited for."""
        return self._share(1.0)

    async def sleep(self, seconds: float) -> None:
        """Sleeps, for a second at most once the drain has begun."""
        if self.begun.is_set():
            await asyncio.sleep(min(seconds, 1.0))
        else:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self.begun.wait()

    def _share(self, share: float) -> bool:
        return self.begun.is_set() and time.monotonic() - self._began >= self.limit_s * share
