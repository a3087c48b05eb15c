"""A job's terminal body as bytes that the platform takes, whatever the answer was.

The platform refuses results over a size. Those become a clear error, or by `runpod.large_results` a
JSON file on the network volume whose path is posted instead. Knows no HTTP.
"""

import asyncio
import hashlib
import json
import logging
import os
import re
from pathlib import Path
from typing import Any, Literal

from serve_app.errors import InternalError, ResultTooLarge, ServeError, error_body, job_error
from serve_app.worker.job import new_request_id

log = logging.getLogger(__name__)

MAX_RUN_BYTES = 10_000_000
MAX_SYNC_BYTES = 20_000_000
"""RunPod's limits of a result, for jobs sent to `/run` and to `/runsync`."""
SYNC_PREFIX = "sync-"
"""How the ids of jobs begin that were sent to `/runsync`."""
FOLDER = "results"

PLAIN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class Results:
    """Terminal bodies; `large` says what becomes of those that are too large to post."""

    def __init__(self, large: Literal["error", "volume"], volume: str) -> None:
        self._large = large
        self._folder = Path(volume) / FOLDER

    async def body(self, job_id: str, result: dict[str, Any]) -> bytes:
        """`result`, or what is said instead where it cannot be posted."""
        try:
            body = as_json(readable(result))
        except ServeError as error:
            return failure(error)
        limit = limit_of(job_id)
        if len(body) <= limit:
            return body
        return await self.instead(job_id, result, len(body))

    async def instead(self, job_id: str, result: dict[str, Any], num_bytes: int) -> bytes:
        """What is posted for a result of `num_bytes`, which is more than the platform takes."""
        log.warning("job %r: its result has %d bytes, too many to post.", job_id, num_bytes)
        if self._large == "volume" and "output" in result:
            try:
                # In a thread: a network volume may take its time.
                kept = await asyncio.to_thread(self._keep, job_id, result["output"])
            except OSError as error:
                log.error("The volume did not take it: %s", error.strerror)
            else:
                return as_json({"output": [kept]})
        return failure(ResultTooLarge(_sentence(job_id, num_bytes)))

    def _keep(self, job_id: str, output: Any) -> dict[str, Any]:
        """Writes the output as JSON; `{"file", "bytes"}`. Raises `OSError`."""
        # Without its parents: where no volume is mounted, a file would die with the container.
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"{file_name(job_id)}.json"
        body = as_json(output)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        try:
            with partial.open("wb") as file:
                file.write(body)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return {"file": str(path), "bytes": len(body)}


def limit_of(job_id: str) -> int:
    """The most bytes that the platform takes as the result of this job."""
    return MAX_SYNC_BYTES if job_id.startswith(SYNC_PREFIX) else MAX_RUN_BYTES


def file_name(job_id: str) -> str:
    """The id where it is a plain name, which leads out of no folder; else its digest."""
    if PLAIN_ID.fullmatch(job_id):
        return job_id
    return hashlib.sha256(job_id.encode("utf-8", "surrogatepass")).hexdigest()


def as_json(value: Any) -> bytes:
    """JSON in UTF-8. Raises `InternalError` for what cannot be said in it."""
    try:
        return json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InternalError("The answer cannot be said in JSON.") from error


def failure(error: ServeError) -> bytes:
    """The terminal body of a job that fails with `error`."""
    return as_json(readable(job_error(error_body(error, new_request_id()))))


def readable(result: dict[str, Any]) -> dict[str, Any]:
    """A failed job's body with `status`, `retry` and `message` as its output, any other as it is.

    RunPod's client shows a job's output and never its error. A plain function that returns
    `{"error", "status", "retry"}` is posted in this form by the SDK; a generator's error is not.
    """
    try:
        error = json.loads(result["error"])["error"]
        told = {name: error[name] for name in ("status", "retry", "message")}
    except (KeyError, TypeError, ValueError):
        return result
    return {"error": result["error"], "output": told}


def _sentence(job_id: str, num_bytes: int) -> str:
    limit = limit_of(job_id)
    sync = "" if limit == MAX_SYNC_BYTES else f", send it to /runsync ({MAX_SYNC_BYTES:,} bytes)"
    return (
        f"The result has {num_bytes:,} bytes and RunPod takes {limit:,}: ask for less at once{sync}"
        ", or let the worker keep it on its volume (runpod.large_results)."
    )
