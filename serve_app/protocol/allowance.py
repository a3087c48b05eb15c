"""Allowance: limits the requests or the tokens of one API key per minute."""

import math
import time
from collections.abc import Callable

MINUTE_S = 60.0
HEADERS = [
    f"x-ratelimit-{quantity}-{unit}"
    for unit in ("requests", "tokens")
    for quantity in ("limit", "remaining", "reset")
]
"""The names of units in the headers of `Allowance.headers`."""


class Allowance:
    """A token bucket of `per_minute` units, full at first and refilled evenly.

    The level may become negative, because some use is known only afterwards. Example with 60 per
    minute: after a use of 60 units, 1 unit is available a second later, and 60 a minute later.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._updated = clock()

    @property
    def left(self) -> float:
        """The amount that may be used now."""
        now = self._clock()
        gained = (now - self._updated) * self.per_minute / MINUTE_S
        self._level = min(self._level + gained, float(self.per_minute))
        self._updated = now
        return self._level

    def use(self, number: int) -> None:
        self._level = self.left - number

    def wait_s(self) -> float:
        """Returns the seconds until one unit can be used."""
        return max(0.0, (1 - self.left) * MINUTE_S / self.per_minute)

    def headers(self, unit: str) -> dict[str, str]:
        """Returns OpenAI's headers (https://platform.openai.com/docs/guides/rate-limits) for
        `unit`."""
        left = self.left
        reset_s = (self.per_minute - left) * MINUTE_S / self.per_minute
        return {
            f"x-ratelimit-limit-{unit}": str(self.per_minute),
            f"x-ratelimit-remaining-{unit}": str(max(0, int(left))),
            f"x-ratelimit-reset-{unit}": _duration(reset_s),
        }


def _duration(seconds: float) -> str:
    """Returns a duration in OpenAI's notation, such as `250ms`, `12s` or `6m0s`."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
