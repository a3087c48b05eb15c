"""The JSON body of an error, in the shape of the API that the request was for."""

import re
from typing import Literal, TypedDict

from serve_app.errors import InvalidRequest, Overloaded, ServeError


class ErrorFields(TypedDict):
    """The fields of an error: OpenAI's four, the two of a failed job, and our id of the request."""

    message: str
    type: str
    param: str | None
    code: str | None
    status: str
    """The job status, such as "OVERLOADED"; the README has a table."""
    retry: bool
    """Whether the same request may succeed later."""
    request_id: str


class ErrorBody(TypedDict):
    """The JSON body of an error, the same at every endpoint."""

    error: ErrorFields


class AnthropicErrorBody(ErrorBody):
    """The JSON body of an error of the Messages API; the `type` of its fields is Anthropic's."""

    type: Literal["error"]
    request_id: str


MESSAGES_PATH = "/v1/messages(/|$)"
"""A regular expression that matches part of every path of the Messages API, below any prefix."""
is_messages = re.compile(MESSAGES_PATH).search
"""Returns a match if `path` belongs to the Messages API, whose errors have Anthropic's shape;
otherwise None."""
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
}
"""Anthropic's `type` for HTTP statuses: https://platform.claude.com/docs/en/api/errors."""


def error_body(error: ServeError, request_id: str, path: str = "") -> ErrorBody:
    """Returns the body that every endpoint sends for `error`, in the shape of the API at `path`."""
    fields: ErrorFields = {
        "message": error.message,
        "type": error.type,
        "param": error.param,
        "code": error.code,
        "status": error.job_status,
        "retry": error.retry,
        "request_id": request_id,
    }
    if not is_messages(path):
        return {"error": fields}
    fields["type"] = _anthropic_type(error)
    body: AnthropicErrorBody = {"type": "error", "error": fields, "request_id": request_id}
    return body


def _anthropic_type(error: ServeError) -> str:
    if (kind := _ANTHROPIC_TYPES.get(error.http_status)) is not None:
        return kind
    if isinstance(error, InvalidRequest | Overloaded):
        return error.type  # both APIs have these two
    return "api_error"
