"""Watchdog: detects a step that does not return.

A device can hang, for example if a kernel never ends or a driver does not answer. The engine's
thread then waits inside the step and cannot report it, so another thread reads `has_hung`.
"""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

SLACK = 10
"""A step may take this many times as long as the longest step so far, so that slow devices need no
separate limit."""


class Watchdog:
    """A context manager around each iteration of the engine's loop. Only one thread enters it."""

    def __init__(self, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`timeout_s` is the minimum time after which a step counts as hung, in seconds."""
        self._timeout_s = timeout_s
        self._clock = clock
        self._longest_s = 0.0
        self._began: float | None = None

    def __enter__(self) -> Self:
        self._began = self._clock()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        assert self._began is not None
        self._longest_s = max(self._longest_s, self._clock() - self._began)
        self._began = None

    @property
    def limit_s(self) -> float:
        """The time after which an iteration counts as hung, in seconds. Thread-safe."""
        return max(self._timeout_s, SLACK * self._longest_s)

    @property
    def has_hung(self) -> bool:
        """Whether the current iteration takes too long. Thread-safe."""
        began = self._began
        return began is not None and self._clock() - began > self.limit_s
