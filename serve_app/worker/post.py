"""Posts to the platform: a result is posted until it is acknowledged, a chunk while it may help.

The SDK repeats a post after a 5xx alone; a reset connection, a timeout or a 4xx loses the result.
Knows what the platform may answer; not what is posted.
"""

import logging
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from serve_app.worker.drain import Drain

if TYPE_CHECKING:
    import aiohttp

log = logging.getLogger(__name__)

RESULT_LIMIT_S = 300.0
"""How long a result is posted again and again."""
RESULT_TIMEOUT_S = 10.0
"""How long the first post of a result may take; each further one may take twice as long."""
MAX_TIMEOUT_S = 120.0
CHUNK_TIMEOUT_S = 10.0
CHUNK_DELAYS_S = (0.5, 1.0)
"""Pauses before a chunk is posted again; a lost one is in the result anyway."""

Outcome = Literal["acknowledged", "too large", "given up"]


def delays(limit_s: float = 15.0) -> Iterator[float]:
    """Seconds before each further try: 0.5, 1, 2, ... up to `limit_s`."""
    delay = 0.5
    while True:
        yield min(delay, limit_s)
        delay *= 2


async def result(
    session: "aiohttp.ClientSession", url: str, body: bytes, job_id: str, drain: Drain
) -> Outcome:
    """Posts a job's one terminal body until the platform has it.

    It may receive the body twice where an acknowledgement was lost, never after one that came.
    """
    began = time.monotonic()
    timeout_s = RESULT_TIMEOUT_S + len(body) / 1_000_000
    for num_failures, delay in enumerate(delays()):
        failure = await _post(session, url, body, job_id, timeout_s)
        if failure is None:
            if num_failures:
                log.info("job %r: its result is delivered, at try %d.", job_id, num_failures + 1)
            return "acknowledged"
        if failure == 413:
            return "too large"
        if num_failures == 0:
            log.warning("job %r: its result was not taken (%s); posting it again.", job_id, failure)
        if time.monotonic() - began > RESULT_LIMIT_S:
            break
        timeout_s = min(2 * timeout_s, MAX_TIMEOUT_S)
        await drain.sleep(delay)
    log.error("job %r: its result could not be delivered (%s).", job_id, failure)
    return "given up"


async def chunk(
    session: "aiohttp.ClientSession", url: str, body: bytes, job_id: str, drain: Drain
) -> bool:
    """Posts a part of a stream; False where the client may miss it from now on.

    Not repeated after a timeout: a chunk that was heard twice could not be told from the text.
    """
    failure = await _post(session, url, body, job_id, CHUNK_TIMEOUT_S)
    for delay in CHUNK_DELAYS_S:
        if failure is None or failure == TIMED_OUT:
            break
        await drain.sleep(delay)
        failure = await _post(session, url, body, job_id, CHUNK_TIMEOUT_S)
    if failure is None:
        return True
    log.warning("job %r: a chunk was not taken (%s); its result has the rest.", job_id, failure)
    return False


TIMED_OUT = "no answer in time"


async def _post(
    session: "aiohttp.ClientSession", url: str, body: bytes, job_id: str, timeout_s: float
) -> int | str | None:
    """Why the platform has not taken the body: a status or a word; None where it has."""
    import aiohttp

    headers = {
        # The SDK's own, for its JSON too; and the id of this job, where the SDK may send another's.
        "Content-Type": "application/x-www-form-urlencoded",
        "charset": "utf-8",
        "X-Request-ID": job_id,
    }
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    try:
        async with session.post(url, data=body, headers=headers, timeout=timeout) as response:
            if response.ok:
                return None  # acknowledged, even if the rest of the answer never comes
            await response.read()
            return response.status
    except TimeoutError:
        return TIMED_OUT
    except (aiohttp.ClientError, OSError, ValueError) as error:
        return type(error).__name__
