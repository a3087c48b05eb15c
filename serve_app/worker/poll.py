"""Long polls for jobs and for stops, at a steady pace whatever the platform answers.

The SDK repeats a failed poll at once: thousands of times a second, with a log line each. These
polls back off, and log one line when polls begin to fail and one when they work again.
"""

import json
import logging
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from serve_app.worker.backoff import Backoff

if TYPE_CHECKING:
    import aiohttp

log = logging.getLogger(__name__)

POLL_TIMEOUT_S = 90.0
"""The SDK's own limit of one poll."""
MIN_POLL_S = 0.5
"""Minimum seconds from one poll to the next. The platform holds a poll open until it has something,
so a shorter poll is followed by a pause."""
RATE_LIMIT_S = 5.0
"""The SDK's own pause after a 429."""

NO_JOBS = (204, 400)
"""RunPod answers 400 to a worker that it has just thawed (FlashBoot)."""
NO_STOPS = (204,)

MAX_DEPTH = 10_000
"""Maximum depth of nested JSON; Python's own limit is a tenth of it."""
MAX_INT_DIGITS = 4_300
"""Python cannot parse longer integers."""


class Poll:
    """Polls repeatedly for one kind of item; `kind` names it in the log."""

    def __init__(
        self, kind: str, read: Callable[[Any], list[Any]], empty_statuses: tuple[int, ...]
    ) -> None:
        """`read` converts the JSON value of an answer to a list, or raises `ValueError`.

        An answer with one of `empty_statuses` means an empty list.
        """
        self._kind = kind
        self._read = read
        self._empty_statuses = empty_statuses
        self._backoff = Backoff()

    async def get(self, session: "aiohttp.ClientSession", url: str) -> tuple[list[Any], float]:
        """Polls once. Returns the items, and the seconds to wait before the next poll."""
        import aiohttp

        began = time.monotonic()
        timeout = aiohttp.ClientTimeout(total=POLL_TIMEOUT_S)
        try:
            async with session.get(url, timeout=timeout) as response:
                body = await response.read()
            if response.status == 429:
                self._failed("429")
                return [], RATE_LIMIT_S
            items = self.items(response.status, body)
        except TimeoutError:
            return [], 0.0
        except (aiohttp.ClientError, OSError) as error:
            return [], self._failed(type(error).__name__)
        except ValueError as error:
            return [], self._failed(str(error))
        self._worked()
        return items, MIN_POLL_S if time.monotonic() - began < MIN_POLL_S else 0.0

    def items(self, status: int, body: bytes) -> list[Any]:
        """Returns the items of an answer. Raises `ValueError` with what is wrong with it."""
        if status in self._empty_statuses or (status == 200 and not body):
            return []
        if status != 200:
            raise ValueError(str(status))
        try:
            value = _parse(body.decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            raise ValueError("the answer is not JSON") from None
        return self._read(value)

    def _failed(self, reason: str) -> float:
        """Logs the first failure in a row. Returns the seconds to wait."""
        if self._backoff.num_failures == 0:
            log.warning("Polls for %s fail (%s); they are repeated.", self._kind, reason)
        return self._backoff.failed()

    def _worked(self) -> None:
        if num_failures := self._backoff.num_failures:
            seconds = self._backoff.reset()
            log.info(
                "Polls for %s work again, after %d failures in %.0f s.",
                self._kind,
                num_failures,
                seconds,
            )


def poll_for_jobs() -> Poll:
    """Returns a poll that brings the platform's job objects, unchecked."""
    return Poll("jobs", _jobs, NO_JOBS)


def poll_for_stops() -> Poll:
    """Returns a poll that brings ids of jobs to stop: cancelled ones and those past their time
    limit."""
    return Poll("stops", _stops, NO_STOPS)


def _jobs(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [value]
    if isinstance(value, list):
        return value
    raise ValueError("the answer is not a job")


def _stops(value: Any) -> list[Any]:
    match value:
        case {"jobsToStop": list(job_ids)}:
            return [job_id for job_id in job_ids if isinstance(job_id, str)]
    raise ValueError("the answer has no `jobsToStop`")


def _parse(text: str) -> Any:
    """Parses JSON with deep nesting and long integers, which Python's defaults refuse.

    One invalid job must not fail the other jobs of its poll; `job.parse` refuses it later.
    """
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, 2 * MAX_DEPTH))
    try:
        return json.loads(text, parse_int=_number)
    finally:
        sys.setrecursionlimit(limit)


def _number(digits: str) -> int | float:
    """Returns an integer, or infinity for one that is too long for Python."""
    return int(digits) if len(digits) < MAX_INT_DIGITS else float(digits)
