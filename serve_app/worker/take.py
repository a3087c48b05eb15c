"""One poll for jobs at a time, at a sensible pace whatever the platform answers.

The SDK polls again at once after an error, thousands of times a second and with a log line each.
Knows the answers to a poll; not what becomes of the jobs.
"""

import json
import logging
import sys
import time
from typing import TYPE_CHECKING, Any

from serve_app.worker.drain import Drain
from serve_app.worker.post import delays

if TYPE_CHECKING:
    import aiohttp

log = logging.getLogger(__name__)

POLL_TIMEOUT_S = 90.0
"""The SDK's own limit of one poll."""
QUICK_S = 0.5
"""A poll that brings nothing in less time was not held open: the next one waits."""
RATE_LIMIT_S = 5.0
"""The SDK's own pause after a 429."""

NOTHING = (204, 400)
"""No job; the platform answers 400 to workers that it has just thawed (FlashBoot)."""


class Trouble:
    """Says once that polls fail, and once that they work again."""

    def __init__(self) -> None:
        self._num_failures = 0
        self._since = 0.0
        self._delays = delays()

    def failed(self, why: object) -> float:
        """Seconds to wait before the next poll."""
        if self._num_failures == 0:
            self._since, self._delays = time.monotonic(), delays()
            log.warning("The platform hands out no jobs (%s); asking again now and then.", why)
        self._num_failures += 1
        return RATE_LIMIT_S if why == 429 else next(self._delays)

    def over(self) -> None:
        if self._num_failures:
            seconds = time.monotonic() - self._since
            num, self._num_failures = self._num_failures, 0
            log.info("The platform answers again, after %d polls in %.0f s.", num, seconds)


async def poll(
    session: "aiohttp.ClientSession", url: str, trouble: Trouble, drain: Drain
) -> list[Any]:
    """What one poll of `url` brings: jobs, or things that should have been jobs; often nothing.

    Returns after the pause that its outcome asks for.
    """
    import aiohttp

    began = time.monotonic()
    why: object
    timeout = aiohttp.ClientTimeout(total=POLL_TIMEOUT_S)
    try:
        async with session.get(url, timeout=timeout) as response:
            body = await response.read()
        given = jobs_in(response.status, body)
    except TimeoutError:
        return []
    except (aiohttp.ClientError, OSError) as error:
        why = type(error).__name__
    except ValueError as error:
        why = error
    else:
        trouble.over()
        if not given and time.monotonic() - began < QUICK_S:
            await drain.sleep(QUICK_S)
        return given
    await drain.sleep(trouble.failed(why))
    return []


def jobs_in(status: int, body: bytes) -> list[Any]:
    """The jobs of an answer; raises `ValueError`, whose argument says what is wrong with it."""
    if status in NOTHING or (status == 200 and not body):
        return []
    if status != 200:
        raise ValueError(status)
    try:
        given = _parsed(body.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        raise ValueError("its answer is not JSON") from None
    if isinstance(given, dict):
        return [given]
    if isinstance(given, list):
        return given
    raise ValueError("its answer is no job")


MAX_DEPTH = 10_000
"""How deep the JSON of other languages may be nested; Python's own limit is a tenth of that."""


def _parsed(text: str) -> Any:
    """One client's odd input must not cost the other jobs of its batch: it is refused later."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, 2 * MAX_DEPTH))
    try:
        # Python reads no integer of over 4,300 digits; a float becomes an infinity.
        return json.loads(text, parse_int=_number)
    finally:
        sys.setrecursionlimit(limit)


def _number(digits: str) -> int | float:
    return int(digits) if len(digits) < 4300 else float(digits)
