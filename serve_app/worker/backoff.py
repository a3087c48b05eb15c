"""Pauses that grow with each failure in a row: 0.5, 1, 2, 4, ... up to 15 seconds."""

import time

FIRST_S = 0.5
MAX_S = 15.0
MAX_DOUBLINGS = 10
"""Maximum exponent of two. It suffices for `MAX_S`, and avoids huge powers in a long outage."""


class Backoff:
    """Counts failures in a row and computes the pause after each."""

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
        """Resets the count. Returns the seconds since the first failure."""
        self.num_failures = 0
        return time.monotonic() - self._first_failure
