"""Posts of one job to the platform: progress updates, chunks, and the result.

The SDK repeats a post only after a 5xx, and loses a result after a reset connection, a timeout or a
4xx. Here a result is posted until it is acknowledged.
"""

import logging
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from serve_app.protocol.call import JsonObject
from serve_app.worker.backoff import Backoff
from serve_app.worker.drain import Drain
from serve_app.worker.in_flight import Job
from serve_app.worker.result import LargeResults, Result, encode, max_result_bytes

if TYPE_CHECKING:
    import aiohttp

log = logging.getLogger(__name__)

MAX_CHUNK_BYTES = 1_000_000
"""RunPod's limit of one streamed chunk."""
RESULT_LIMIT_S = 300.0
"""Maximum seconds for which the post of a result is repeated."""
RESULT_TIMEOUT_S = 10.0
"""Timeout of a result's first post in seconds, plus 1 s per MB. It doubles with each further
post."""
MAX_TIMEOUT_S = 120.0
CHUNK_TIMEOUT_S = 10.0
CHUNK_PAUSES_S = (0.5, 1.0)
"""Pauses before a chunk is posted again, in seconds; a lost chunk is also in the result."""
TIMED_OUT = "no answer in time"

Outcome = Literal["acknowledged", "too large", "given up"]


class Posts(Protocol):
    """Posts the output of one job for its handler."""

    request_id: str
    """The id of the job's request in chunks, errors and log lines."""
    last_chunk: JsonObject
    """The last response chunk of the job's stream; {} before the first. The handler sets it. It is
    needed for an error event, because an API may number its events."""

    async def progress(self, update: dict[str, Any]) -> None:
        """Posts a progress update. A lost update has no effect."""

    async def chunk(self, value: bytes) -> None:
        """Posts one value of the output, written as JSON."""

    async def result(self, result: Result) -> None:
        """Posts the result, which ends the job."""


@dataclass(slots=True)
class JobPosts:
    """Posts of `job` over HTTP. Both URLs hold `$ID` in place of the job's id."""

    session: "aiohttp.ClientSession"
    job: Job
    drain: Drain
    large_results: LargeResults
    chunk_url: str
    result_url: str
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex, init=False)
    last_chunk: JsonObject = field(default_factory=dict, init=False)
    _takes_chunks: bool = field(default=True, init=False)
    """False after a chunk was lost: a stream that ends early is better than text with a gap."""

    async def progress(self, update: dict[str, Any]) -> None:
        body = encode({"status": "IN_PROGRESS", "output": update})
        failure = await self._post(self.result_url, "false", body, CHUNK_TIMEOUT_S)
        if failure is not None:
            log.warning("job %r: a progress update was lost (%s).", self.job.id, failure)

    async def chunk(self, value: bytes) -> None:
        body = b'{"output":%b}' % value
        # Only an answer that is no stream can be larger than a chunk; the result has it anyway.
        self._takes_chunks = (
            self._takes_chunks and len(body) <= MAX_CHUNK_BYTES and await self._post_chunk(body)
        )

    async def result(self, result: Result) -> None:
        self.job.answering()
        self.job.is_failing = result.error is not None
        body = result.body()
        outcome: Outcome = "too large"
        if len(body) <= max_result_bytes(self.job.id):
            outcome = await self._post_until_acknowledged(result)
        if outcome == "too large":
            result = await self.large_results.replacement(
                self.job.id, self.request_id, result, len(body)
            )
            self.job.is_failing = result.error is not None
            outcome = await self._post_until_acknowledged(result)
        self.job.is_output_acknowledged = outcome == "acknowledged" and result.error is None

    async def _post_until_acknowledged(self, result: Result) -> Outcome:
        """Posts `result` until the platform acknowledges it.

        If an acknowledgement was lost, the platform may receive the result twice.
        """
        job_id, backoff, body = self.job.id, Backoff(), result.body()
        began, is_stream = time.monotonic(), str(result.is_list).lower()
        timeout_s = RESULT_TIMEOUT_S + len(body) / 1_000_000
        while failure := await self._post(self.result_url, is_stream, body, timeout_s):
            if failure == 413:
                return "too large"
            if backoff.num_failures == 0:
                log.warning(
                    "job %r: the post of its result failed (%s); it is repeated.", job_id, failure
                )
            if time.monotonic() - began > RESULT_LIMIT_S:
                log.error("job %r: the result could not be delivered (%s).", job_id, failure)
                return "given up"
            timeout_s = min(2 * timeout_s, MAX_TIMEOUT_S)
            await self.drain.sleep(backoff.failed())
        if backoff.num_failures:
            num_tries = backoff.num_failures + 1
            log.info("job %r: the result was delivered by post %d.", job_id, num_tries)
        return "acknowledged"

    async def _post_chunk(self, body: bytes) -> bool:
        """Posts a chunk. Returns False if the client may miss it.

        A chunk is not repeated after a timeout: the platform may have it, and the client would read
        the text twice.
        """
        failure = await self._post(self.chunk_url, "false", body, CHUNK_TIMEOUT_S)
        for pause_s in CHUNK_PAUSES_S:
            if failure is None or failure == TIMED_OUT:
                break
            await self.drain.sleep(pause_s)
            failure = await self._post(self.chunk_url, "false", body, CHUNK_TIMEOUT_S)
        if failure is None:
            return True
        log.warning("job %r: a chunk was lost (%s); the result contains it.", self.job.id, failure)
        return False

    async def _post(
        self, url: str, is_stream: str, body: bytes, timeout_s: float
    ) -> int | str | None:
        """Posts `body` once. Returns None if the platform acknowledges it, else the HTTP status or
        the name of the failure."""
        import aiohttp

        headers = {
            # The SDK's headers for JSON. Its X-Request-ID may be that of another job.
            "Content-Type": "application/x-www-form-urlencoded",
            "charset": "utf-8",
            "X-Request-ID": self.job.id,
        }
        url = f"{url.replace('$ID', self.job.id)}&isStream={is_stream}"
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self.session.post(
                url, data=body, headers=headers, timeout=timeout
            ) as response:
                if response.ok:
                    return None  # acknowledged, even if the rest of the answer never comes
                await response.read()
                return response.status
        except TimeoutError:
            return TIMED_OUT
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return type(error).__name__
