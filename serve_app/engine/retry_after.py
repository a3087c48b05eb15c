"""RetryAfter: when refused requests should come again, from the measured drain rate."""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

MAX_S = 60
"""Longest wait that a refused request is told, in seconds."""
MAX_FULL_S = 1.0
"""Longest time for which a proxy may refuse requests without asking, in seconds."""
UNMEASURED_FULL_S = 0.1
"""That time until the rate is measured."""
MEMORY_S = 20.0
"""Time constant of the measured rate: an end counts 1/e after this many saturated seconds."""


class Places(NamedTuple):
    """What a proxy needs to refuse requests by itself."""

    num_places: int
    """Places of the request queue, the running sequences' included."""
    place_s: float
    """Measured seconds from one free place to the next; 0 until they are measured."""
    full_s: float
    """Seconds for which a full queue may be taken for full without asking: few places become free
    meanwhile."""
    min_s: int
    """The shortest `Retry-After`."""


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

    @property
    def _place_s(self) -> float | None:
        if self._num_ends < 1 or self._seconds <= 0:
            return None
        return self._seconds / self._num_ends

    def places(self, num_places: int, num_unasked: int) -> Places:
        """For a queue of `num_places`, of which a proxy may leave `num_unasked` free."""
        place_s = self._place_s
        full_s = UNMEASURED_FULL_S if place_s is None else max(num_unasked, 1) * place_s
        return Places(num_places, place_s or 0.0, min(full_s, MAX_FULL_S), self._min_s)

    def next_s(self) -> int:
        """The wait of one more refused request, in whole seconds."""
        if (place_s := self._place_s) is None:
            return self._min_s
        now = self._clock()
        turn = max(self._turn, now) + place_s
        self._turn = min(turn, now + MAX_S)
        return min(max(math.ceil(self._turn - now), self._min_s), MAX_S)
