"""What the platform wants stopped, heard of for as long as the worker lives.

By the SDK's own poll, at a sensible pace and whatever it is answered: a job may have to be stopped
later. Knows not what a stop does.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from serve_app.worker.post import delays
from serve_app.worker.take import POLL_TIMEOUT_S, QUICK_S, RATE_LIMIT_S

if TYPE_CHECKING:
    from aiohttp import ClientSession

log = logging.getLogger(__name__)


async def hear(session: "ClientSession", stop: Callable[[str], None]) -> None:
    """Calls `stop` with the id of each job that is to be stopped, until it is cancelled.

    Returns at once where the platform gave no address to hear of stops.
    """
    from runpod.http_client import TooManyRequests
    from runpod.serverless.modules import rp_job

    if rp_job._job_stop_url() is None:
        log.warning("The platform gave no address to hear of cancelled jobs; they run on.")
        return
    pauses = delays()
    while True:
        began = time.monotonic()
        try:
            async with asyncio.timeout(POLL_TIMEOUT_S):
                job_ids = await rp_job.get_stop_signals(session)
            for job_id in job_ids:
                stop(job_id)
            pauses = delays()
            if time.monotonic() - began < QUICK_S:
                await asyncio.sleep(QUICK_S)
        except TimeoutError:
            continue
        except TooManyRequests:
            await asyncio.sleep(RATE_LIMIT_S)
        except Exception as error:
            log.debug("Stops cannot be heard of: %s", type(error).__name__)
            await asyncio.sleep(next(pauses))
