"""RetryAfter: when refused requests should come again, from the measured drain rate."""

import math
import time
from collections.abc import Callable

MAX_S = 60
"""Longest wait that a refused request is told, in seconds."""
MEMORY_S = 20.0
"""Time constant of the measured rate: an end counts 1/e after this many saturated seconds."""


class RetryAfter:
    """Gives refused requests one turn after another, as fast as accepted ones end.

    Example: at 20 ends a second, the first of 100 requests that are refused together is told 1 s
    and the last one 5 s. Refused requests so come again about as fast as places become free, and
    are seldom refused twice. The caller holds a lock.
    """

    def __init__(self, min_s: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`min_s` is the shortest wait, and the only one until a rate is measured."""
        self._min_s = min_s
        self._clock = clock
        self._last_end: float | None = None
        self._num_ends = 0.0
        self._seconds = 0.0
        self._turn = 0.0
        """The turn of the last refused request, on `clock`."""

    def ended(self, *, is_saturated: bool) -> None:
        """Counts the end of a request.

        `is_saturated`: others wait for its place, so the time to the next end shows what the engine
        can do.
        """
        now = self._clock()
        if self._last_end is not None:
            seconds = now - self._last_end
            weight = math.exp(-seconds / MEMORY_S)
            self._num_ends = self._num_ends * weight + 1
            self._seconds = self._seconds * weight + seconds
        self._last_end = now if is_saturated else None

    def next_s(self) -> int:
        """The wait of one more refused request, in whole seconds."""
        if self._num_ends < 1 or self._seconds <= 0:
            return self._min_s
        now = self._clock()
        turn = max(self._turn, now) + self._seconds / self._num_ends
        self._turn = min(turn, now + MAX_S)
        return min(max(math.ceil(self._turn - now), self._min_s), MAX_S)
