"""Log lines of jobs: one when a job starts, one when it ends, and the job's id on every line.

    Job started: ID (request 5c1f...)
    Job completed: ID in 0.52 s
    Job failed: ID in 0.52 s (request 5c1f...) - OOM_ERROR: The GPU ran out of memory; ...

A failure is logged at ERROR. The message of a refused request may quote the user, so its line has
the name of the field instead.

On RunPod each line is a JSON object with the keys of the SDK's own lines (`JsonLines`). RunPod's
console uses them to show the lines of one job.
"""

import json
import logging
from contextvars import ContextVar
from typing import Any

from serve_app.config.log_format import JsonFormatter
from serve_app.error_body import ErrorBody
from serve_app.errors import InvalidRequest
from serve_app.protocol.chat import ChatRequest
from serve_app.protocol.completions import CompletionRequest
from serve_app.protocol.messages_api.request import MessagesRequest
from serve_app.protocol.prompt import PromptRequest
from serve_app.protocol.responses_api.request import ResponsesRequest

log = logging.getLogger(__name__)

running_job: ContextVar[str | None] = ContextVar("running_job", default=None)
"""The id of the current task's job."""

SCHEMAS = (PromptRequest, ChatRequest, CompletionRequest, MessagesRequest, ResponsesRequest)
LEVELS = {"WARNING": "WARN", "CRITICAL": "ERROR"}
"""Level names that differ in the SDK."""


class JsonLines(logging.Formatter):
    """Writes a record as the SDK does: `{"requestId": job id or null, "message", "level"}`."""

    def format(self, record: logging.LogRecord) -> str:
        level = LEVELS.get(record.levelname, record.levelname)
        line = {
            "requestId": running_job.get(),
            "message": super().format(record),
            "level": level,
        }
        return json.dumps(line)


class FullJsonLines(JsonFormatter):
    """Writes the fields of `observability.log_format: json` after the SDK's own."""

    def line(self, record: logging.LogRecord) -> dict[str, Any]:
        level = LEVELS.get(record.levelname, record.levelname)
        return {"requestId": running_job.get()} | super().line(record) | {"level": level}


def use_json_lines() -> None:
    """Makes the handlers of the root logger write `JsonLines`, or all fields if they write JSON."""
    for handler in logging.getLogger().handlers:
        is_json = isinstance(handler.formatter, JsonFormatter)
        handler.setFormatter(FullJsonLines() if is_json else JsonLines())


def started(job_id: object, request_id: str) -> None:
    fields = {"job_id": job_id, "request_id": request_id}
    log.info("Job started: %s (request %s)", job_id, request_id, extra={"fields": fields})


def completed(job_id: object, seconds: float) -> None:
    fields = {"job_id": job_id, "seconds": round(seconds, 3)}
    log.info("Job completed: %s in %.2f s", job_id, seconds, extra={"fields": fields})


def failed(job_id: object, seconds: float, body: ErrorBody) -> None:
    """Logs a failure with its cause, without text that may quote the user."""
    error = body["error"]
    request_id, status = error["request_id"], error["status"]
    fields = {
        "job_id": job_id,
        "request_id": request_id,
        "seconds": round(seconds, 3),
        "status": status,
    }
    line = "Job failed: %s in %.2f s (request %s) - %s: %s"
    args = (job_id, seconds, request_id, status, _cause(body))
    log.error(line, *args, extra={"fields": fields})


def _cause(body: ErrorBody) -> str:
    error = body["error"]
    if error["status"] != InvalidRequest.job_status:
        return error["message"]
    field = (error["param"] or "").split(".")[0]
    if any(field in schema.model_fields for schema in SCHEMAS) or field == "input":
        return f"`{field}` is refused; the reason is in the job's error"
    return error["code"] or "the request is refused; the reason is in the job's error"
