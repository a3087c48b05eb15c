"""LoopLag: measures how late the event loop runs a callback because it was busy."""

import asyncio
from collections.abc import Callable

INTERVAL_S = 0.1
"""Seconds between two measurements."""


class LoopLag:
    """Calls `observe` with the lag of the event loop, in seconds, ten times a second."""

    def __init__(self, observe: Callable[[float], None]) -> None:
        self._observe = observe
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Starts in the running event loop, unless it has already started there."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop = loop
            self._wait(loop)

    def _wait(self, loop: asyncio.AbstractEventLoop) -> None:
        due = loop.time() + INTERVAL_S
        loop.call_at(due, self._measure, loop, due)

    def _measure(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        self._observe(max(loop.time() - due, 0.0))
        self._wait(loop)
