"""RetryAfter: computes `Retry-After` for refused requests from the measured rate of ends."""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

MAX_S = 60
"""Maximum `Retry-After`, in seconds."""
MAX_FULL_S = 1.0
"""Maximum of `Places.full_s`."""
UNMEASURED_FULL_S = 0.1
"""`Places.full_s` until the rate is measured."""
MEMORY_S = 20.0
"""Time constant of the measured rate: an end counts 1/e after this many saturated seconds."""


class Places(NamedTuple):
    """The numbers that a proxy needs to refuse requests itself."""

    num_places: int
    """Number of places in the request queue, including those of running sequences."""
    place_s: float
    """Measured mean time between two freed places, in seconds; 0 until it is measured."""
    full_s: float
    """Seconds for which the proxy may refuse requests itself after a replica has reported a full
    queue. Few places become free in that time."""
    min_s: int
    """Minimum `Retry-After`, in seconds."""


class RetryAfter:
    """Assigns times to refused requests one after another, at the rate at which requests end.

    Example: if 20 requests end per second and 100 requests are refused together, the first gets
    `Retry-After` 1 and the last 5. So refused requests return about as fast as places become free,
    and are seldom refused twice. Not thread-safe: the caller holds a lock.
    """

    def __init__(self, min_s: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`min_s` is the minimum, and the only value until a rate is measured."""
        self._min_s = min_s
        self._clock = clock
        self._last_end: float | None = None
        self._num_ends = 0.0
        self._seconds = 0.0
        self._turn = 0.0
        """The time assigned to the last refused request, on `clock`."""

    def ended(self, *, is_saturated: bool) -> None:
        """Counts the end of a request.

        `is_saturated` means that other requests wait for its place. Only then does the time until
        the next end measure the engine's capacity.
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

    def places(self, num_places: int, num_recheck_places: int) -> Places:
        """Returns the numbers for a proxy in front of a queue of `num_places`.

        The proxy may refuse requests itself until about `num_recheck_places` places are free.
        """
        place_s = self._place_s
        full_s = UNMEASURED_FULL_S if place_s is None else max(num_recheck_places, 1) * place_s
        return Places(num_places, place_s or 0.0, min(full_s, MAX_FULL_S), self._min_s)

    def next_s(self) -> int:
        """Returns the `Retry-After` of one more refused request, in whole seconds."""
        if (place_s := self._place_s) is None:
            return self._min_s
        now = self._clock()
        turn = max(self._turn, now) + place_s
        self._turn = min(turn, now + MAX_S)
        return min(max(math.ceil(self._turn - now), self._min_s), MAX_S)
