"""Pauses that grow with each failure in a row: 0.5, 1, 2, 4, ... up to 15 seconds."""

import time

FIRST_S = 0.5
MAX_S = 15.0
MAX_DOUBLINGS = 10
"""Enough to reach `MAX_S`; keeps the power of two small however long an outage lasts."""


class Backoff:
    """Counts failures in a row and says how long to wait after each."""

    def __init__(self) -> None:
        self.num_failures = 0
        self._first_failure = 0.0

    def failed(self) -> float:
        """Counts a failure. Returns the seconds to wait before the next try."""
        if self.num_failures == 0:
            self._first_failure = time.monotonic()
        pause_s = FIRST_S * 2.0 ** min(self.num_failures, MAX_DOUBLINGS)
        self.num_failures += 1
        return min(pause_s, MAX_S)

    def reset(self) -> float:
        """Forgets the failures. Returns the seconds since the first of them."""
        self.num_failures = 0
        return time.monotonic() - self._first_failure
