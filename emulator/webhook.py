"""Posts the state of an ended job to the URL that its client gave as `webhook`."""

import asyncio
import contextlib

import aiohttp

from emulator.queue import Job

PAUSE_S = 10.0
"""Seconds between posts. RunPod repeats the post twice, 10 s apart, if the answer is not a 200."""
TIMEOUT_S = 10.0
"""Timeout of a post in seconds (a guess)."""


async def notify(job: Job) -> None:
    """Waits for the end of `job`, and posts the object that `/status` shows."""
    while not job.is_over:
        await job.has_changed.wait()
    url, view = str(job.request["webhook"]), job.view()
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        for is_last in (False, False, True):
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, ValueError):
                async with session.post(url, json=view) as response:
                    if response.status == 200:
                        return
            if not is_last:
                await asyncio.sleep(PAUSE_S)
