"""A job's result: its whole output, or its error, as JSON within the platform's size limit.

`LargeResults` replaces a result over the limit: by an error, or by the path of a file on the
network volume (`runpod.large_results`).
"""

import asyncio
import errno
import hashlib
import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from serve_app.error_body import ErrorBody, error_body
from serve_app.errors import InternalError, ResultTooLarge
from serve_app.machine.volume import is_mounted

log = logging.getLogger(__name__)

MAX_RUN_BYTES = 10_000_000
MAX_SYNC_BYTES = 20_000_000
"""RunPod's limits of a result, for jobs sent to `/run` and to `/runsync`."""
SYNC_PREFIX = "sync-"
"""Prefix of the ids of jobs sent to `/runsync`, the only difference from other jobs."""
FOLDER = "results"

PLAIN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

_ENCODER = json.JSONEncoder(allow_nan=False, ensure_ascii=False, separators=(",", ":"))


def encode(value: Any) -> bytes:
    """Returns `value` as JSON in UTF-8, with U+FFFD for lone surrogates, which UTF-8 cannot encode.

    Raises `InternalError` for values that JSON cannot represent: NaN, an infinity, other objects.
    """
    try:
        text = _ENCODER.encode(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise InternalError("The answer cannot be written as JSON.") from error
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a job: `output`, and for a failed job `error`."""

    output: bytes
    """JSON: an object, or a list of chunks; for a failed job see `of_error`."""
    error: str | None = None
    """An error body as one JSON string: RunPod's clients show any other type as a Python repr."""
    is_list: bool = False
    """Whether the output is a list of chunks. It is posted as the SDK posts a generator's
    output."""

    @classmethod
    def of_error(cls, body: ErrorBody, *, is_list: bool = False) -> Self:
        """Returns the result of a job that fails with the error body `body`.

        Its output repeats `status`, `retry` and `message`: RunPod's Python client shows a job's
        output and never its error.
        """
        fields = {name: body["error"][name] for name in ("status", "retry", "message")}
        return cls(encode(fields), json.dumps(body), is_list)

    def body(self) -> bytes:
        """Returns the body of the post to the platform."""
        if self.error is None:
            return b'{"output":%b}' % self.output
        return b'{"error":%b,"output":%b}' % (encode(self.error), self.output)


def max_result_bytes(job_id: str) -> int:
    """Returns the maximum bytes of this job's result, by the platform's limits."""
    return MAX_SYNC_BYTES if job_id.startswith(SYNC_PREFIX) else MAX_RUN_BYTES


class LargeResults:
    """Replaces results that the platform refuses for their size."""

    def __init__(self, policy: Literal["error", "volume"], volume: Path) -> None:
        """With `policy` "volume" outputs become files in the folder `results` of `volume`."""
        self._policy = policy
        self._volume = volume

    async def replacement(
        self, job_id: str, request_id: str, result: Result, num_bytes: int
    ) -> Result:
        """Returns the result to post instead of `result`, whose body has `num_bytes`."""
        log.warning(
            "job %r: its result has %d bytes, more than the platform accepts.", job_id, num_bytes
        )
        remedy = "let the worker keep it on its volume (runpod.large_results)"
        if self._policy == "volume" and result.error is None:
            try:
                # In a thread: a network volume can be slow.
                file = await asyncio.to_thread(self._write, job_id, result.output)
            except OSError as error:
                remedy = f"mount a volume that can be written ({error.strerror})"
                log.error("The result could not be written to the volume: %s.", error.strerror)
            else:
                return Result(encode([file] if result.is_list else file), is_list=result.is_list)
        too_large = ResultTooLarge(_message(job_id, num_bytes, remedy))
        return Result.of_error(error_body(too_large, request_id), is_list=result.is_list)

    def _write(self, job_id: str, output: bytes) -> dict[str, Any]:
        """Writes `output` to a file. Returns `{"file": path, "bytes": size}`. Raises `OSError`."""
        if not is_mounted(self._volume):  # the file would be lost with the container
            raise OSError(errno.ENODEV, f"no volume is mounted at {self._volume}")
        folder = self._volume / FOLDER
        folder.mkdir(exist_ok=True)
        path = folder / f"{file_name(job_id)}.json"
        partial = path.with_suffix(f".{os.getpid()}.partial")
        try:
            with partial.open("wb") as file:
                file.write(output)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return {"file": str(path), "bytes": len(output)}


def file_name(job_id: str) -> str:
    """Returns the id if it is a plain file name that cannot leave the folder; otherwise its
    digest."""
    if PLAIN_ID.fullmatch(job_id):
        return job_id
    return hashlib.sha256(job_id.encode("utf-8", "surrogatepass")).hexdigest()


def _message(job_id: str, num_bytes: int, remedy: str) -> str:
    limit = max_result_bytes(job_id)
    sync = "" if limit == MAX_SYNC_BYTES else f", send it to /runsync ({MAX_SYNC_BYTES:,} bytes)"
    return (
        f"The result has {num_bytes:,} bytes, but RunPod allows {limit:,}: send a smaller job{sync}"
        f", or {remedy}."
    )
