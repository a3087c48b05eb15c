"""The error tree and its one mapper."""

import json
import pickle

import pytest
from anthropic.types.shared import ErrorResponse
from pydantic import TypeAdapter

from serve_app import errors
from serve_app.error_body import error_body
from serve_app.errors import ServeError, as_serve_error
from serve_app.worker.result import Result

# The README's table of errors: class, HTTP status, type, code, job status, retry.
TABLE = [
    ("InvalidRequest", 400, "invalid_request_error", None, "VALIDATION_FAILED", False),
    ("MethodNotAllowed", 405, "invalid_request_error", None, "VALIDATION_FAILED", False),
    (
        "ContextLengthExceeded",
        400,
        "invalid_request_error",
        "context_length_exceeded",
        "VALIDATION_FAILED",
        False,
    ),
    (
        "RequestTooLarge",
        413,
        "invalid_request_error",
        "request_too_large",
        "VALIDATION_FAILED",
        False,
    ),
    (
        "RequestTooSlow",
        408,
        "invalid_request_error",
        "request_timeout",
        "VALIDATION_FAILED",
        True,
    ),
    (
        "UnsupportedEncoding",
        415,
        "invalid_request_error",
        "unsupported_encoding",
        "VALIDATION_FAILED",
        False,
    ),
    (
        "ResultTooLarge",
        413,
        "invalid_request_error",
        "result_too_large",
        "VALIDATION_FAILED",
        False,
    ),
    ("ModelNotFound", 404, "invalid_request_error", "model_not_found", "VALIDATION_FAILED", False),
    ("RouteNotFound", 404, "invalid_request_error", "not_found", "VALIDATION_FAILED", False),
    ("InvalidApiKey", 401, "invalid_request_error", "invalid_api_key", "VALIDATION_FAILED", False),
    (
        "OriginNotAllowed",
        403,
        "invalid_request_error",
        "origin_not_allowed",
        "VALIDATION_FAILED",
        False,
    ),
    ("QueueFull", 429, "overloaded_error", "queue_full", "OVERLOADED", True),
    ("RateLimited", 429, "rate_limit_error", "rate_limit_exceeded", "OVERLOADED", True),
    ("Draining", 503, "overloaded_error", "draining", "OVERLOADED", True),
    ("Loading", 503, "overloaded_error", "loading", "OVERLOADED", True),
    ("OutOfMemory", 503, "server_error", "out_of_memory", "OOM_ERROR", False),
    ("DeadlinePassed", 504, "server_error", "timeout", "TIMEOUT", True),
    ("EngineDead", 503, "server_error", "engine_dead", "CONNECTION_ERROR", True),
    ("ModelLoadFailed", 503, "server_error", "model_load_failed", "MODEL_LOAD_FAILED", False),
    ("MachineUnfit", 503, "server_error", "model_load_failed", "MODEL_LOAD_FAILED", False),
    ("LoaderKilled", 503, "server_error", "model_load_failed", "MODEL_LOAD_FAILED", False),
    ("InternalError", 500, "server_error", "internal_error", "UNKNOWN_ERROR", True),
]


@pytest.mark.parametrize(("name", "http", "type_", "code", "status", "retry"), TABLE)
def test_each_error_says_what_the_table_says(
    name: str, http: int, type_: str, code: str | None, status: str, retry: bool
) -> None:
    """Status, type, code, job status and retry are those that users were promised."""
    error = getattr(errors, name)("Do this.")
    body = error_body(error, "req-1")["error"]
    assert error.http_status == http
    assert body == {
        "message": "Do this.",
        "type": type_,
        "param": None,
        "code": code,
        "status": status,
        "retry": retry,
        "request_id": "req-1",
    }


ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "api_error",
    504: "timeout_error",
}


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[0])
def test_errors_of_the_messages_api_have_anthropics_shape(row: tuple[str, int, str]) -> None:
    """The type is Anthropic's for the status; our fields of the error stay, as jobs need them."""
    name, status, type_ = row[:3]
    error = getattr(errors, name)("Do this.")
    body = error_body(error, "req-1", "/v1/messages")
    overloaded = "overloaded_error" if type_ == "overloaded_error" else "api_error"
    expected = ANTHROPIC_TYPES.get(status, overloaded)
    fields = error_body(error, "req-1")["error"] | {"type": expected}
    assert body == {"type": "error", "request_id": "req-1", "error": fields}
    if expected != "request_too_large":  # documented, and not in the package
        TypeAdapter(ErrorResponse).validate_python(body)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v1/messages", True),
        ("/v1/messages/count_tokens", True),
        ("/prefix/v1/messages", True),
        ("/v1/messages2", False),
        ("/v1/chat/completions", False),
        ("", False),
    ],
)
def test_the_shape_follows_the_path(path: str, expected: bool) -> None:
    """Paths of the Messages API, whatever they are mounted at, and no others."""
    assert ("type" in error_body(errors.QueueFull("Later."), "r", path)) is expected


def test_the_table_is_complete() -> None:
    """The table has every error class of the module."""

    def leaves(kind: type[ServeError]) -> set[str]:
        children = [each for each in kind.__subclasses__() if each.__module__ == errors.__name__]
        below = {name for child in children for name in leaves(child)}
        return below | {kind.__name__}

    assert leaves(ServeError) - {"ServeError", "Overloaded"} == {row[0] for row in TABLE}


def test_unknown_exceptions_keep_their_text_to_themselves() -> None:
    """A bug's message, which may hold paths or user text, never reaches the client."""
    body = json.dumps(error_body(as_serve_error(RuntimeError("/secret/path of a user")), "req-1"))
    assert "secret" not in body
    assert "req-1" in body


def test_out_of_memory_is_known_by_its_class() -> None:
    """torch's error, and no other of the same name, is recognised without importing torch."""
    torch = pytest.importorskip("torch")
    error = as_serve_error(torch.OutOfMemoryError("tried 3 GiB"))
    assert (error.job_status, error.retry) == ("OOM_ERROR", False)

    class OutOfMemoryError(Exception): ...

    assert as_serve_error(OutOfMemoryError()).job_status == "UNKNOWN_ERROR"


def test_timeouts_are_deadlines() -> None:
    """asyncio's TimeoutError is a passed deadline, worth a retry."""
    assert as_serve_error(TimeoutError()).job_status == "TIMEOUT"


def test_errors_survive_a_process_boundary() -> None:
    """Pickling keeps class, message, param and retry."""
    sent = errors.ModelLoadFailed("No network; try again.", retry=True)
    got = pickle.loads(pickle.dumps(sent))
    assert (type(got), got.message, got.retry) == (type(sent), sent.message, True)
    refused = pickle.loads(pickle.dumps(errors.QueueFull("Later.", retry_after_s=3)))
    assert refused.retry_after_s == 3


def test_a_failed_job_carries_json_in_a_string() -> None:
    """The SDK turns anything but a string into a Python repr."""
    body = error_body(errors.QueueFull("Later."), "r")
    assert json.loads(Result.of_error(body).error or "") == body


def test_headers_follow_from_the_error() -> None:
    """The HTTP headers of an error belong to its class."""
    assert errors.QueueFull("Later.", retry_after_s=3).headers == {"Retry-After": "3"}
    assert errors.MethodNotAllowed("No.", allow="POST").headers == {"Allow": "POST"}
    assert errors.InvalidApiKey("No.").headers == {"WWW-Authenticate": "Bearer"}
    assert errors.InternalError("Oops.").headers == {}


def test_only_an_unexpected_error_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """The log has one record, with the request's id and without the exception's text."""
    known = errors.QueueFull("Later.")
    assert errors.handle_error(known, "r1") is known
    assert not caplog.records
    assert errors.handle_error(RuntimeError("my words"), "r2").code == "internal_error"
    (record,) = caplog.records
    assert "r2" in record.getMessage()
    assert "my words" not in record.getMessage()
