"""Every error that a client can get, and the function that maps any exception to one of them.

After an `InvalidRequest` the client must change the request; after an `Overloaded` the same request
may succeed later; other errors are failures of the server. An endpoint passes each exception that
it catches to `handle_error` once and sends the resulting `error_body.error_body`. An exception that
is not a `ServeError` gets a fixed message without the exception's text.
"""

import logging
import sys
import traceback
from typing import Any, ClassVar

log = logging.getLogger(__name__)

# Sentences that several servers send: a replica, HAProxy or the health server.
FULL_QUEUE = (
    "Too many requests are waiting. Send this request again after the number of seconds in "
    "the Retry-After header."
)
NOT_READY = "The model is not ready to answer here; see /health, and try again."
LATE_BODY = "The body did not arrive in time; send it faster."
NOT_READY_RETRY_S = 5
"""`Retry-After` of NOT_READY, in seconds."""


class ServeError(Exception):
    """An error with one clear sentence for the user.

    `message` says what to do. It reaches the client unchanged, so it must contain no internals.
    `param` is the request field that is wrong; `retry_after_s` (seconds) becomes `Retry-After`.
    """

    http_status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = "internal_error"
    job_status: ClassVar[str] = "UNKNOWN_ERROR"
    retry: bool = True

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        """The HTTP headers that belong to this error."""
        return {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own pickling drops keyword arguments; errors may cross a process boundary.
        return (_rebuild, (type(self), self.message, self.__dict__))


def _rebuild(kind: type[ServeError], message: str, state: dict[str, Any]) -> ServeError:
    error = kind(message)
    vars(error).update(state)
    return error


class InvalidRequest(ServeError):
    """The request is malformed, or asks for something that is not supported (`param` says what)."""

    http_status = 400
    type = "invalid_request_error"
    code: ClassVar[str | None] = None
    job_status = "VALIDATION_FAILED"
    retry = False


class InvalidApiKey(InvalidRequest):
    http_status = 401
    code = "invalid_api_key"

    @property
    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": "Bearer"}


class OriginNotAllowed(InvalidRequest):
    """A web page has sent the request, and its origin may not call the API."""

    http_status = 403
    code = "origin_not_allowed"


class ModelNotFound(InvalidRequest):
    http_status = 404
    code = "model_not_found"


class RouteNotFound(InvalidRequest):
    http_status = 404
    code = "not_found"


class MethodNotAllowed(InvalidRequest):
    """`allow` is the value of the header `Allow`, such as "GET, HEAD"."""

    http_status = 405

    def __init__(self, message: str, *, allow: str = "") -> None:
        super().__init__(message)
        self.allow = allow

    @property
    def headers(self) -> dict[str, str]:
        return {"Allow": self.allow}


class ContextLengthExceeded(InvalidRequest):
    """Prompt and `max_tokens` together do not fit into the model's context."""

    code = "context_length_exceeded"


class RequestTooLarge(InvalidRequest):
    http_status = 413
    code = "request_too_large"


class RequestTooSlow(InvalidRequest):
    """The body did not arrive in time; the same request may succeed over a better connection."""

    http_status = 408
    code = "request_timeout"
    retry = True


class UnsupportedEncoding(InvalidRequest):
    """The body has a `Content-Encoding` that is not supported."""

    http_status = 415
    code = "unsupported_encoding"


class ResultTooLarge(InvalidRequest):
    """The platform refuses a result of this size; a smaller request has a smaller result."""

    http_status = 413
    code = "result_too_large"


class Overloaded(ServeError):
    """The server refuses the request for now. Nothing was started, so the client may send it
    again."""

    type = "overloaded_error"
    job_status = "OVERLOADED"


class QueueFull(Overloaded):
    http_status = 429
    code = "queue_full"


class RateLimited(Overloaded):
    """The API key has used up one of its limits."""

    http_status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class Draining(Overloaded):
    http_status = 503
    code = "draining"


class Loading(Overloaded):
    http_status = 503
    code = "loading"


class OutOfMemory(ServeError):
    http_status = 503
    code = "out_of_memory"
    job_status = "OOM_ERROR"
    retry = False


class DeadlinePassed(ServeError):
    http_status = 504
    code = "timeout"
    job_status = "TIMEOUT"


class EngineDead(ServeError):
    """The engine, the replica or Ray has died; another worker can answer."""

    http_status = 503
    code = "engine_dead"
    job_status = "CONNECTION_ERROR"


class ModelLoadFailed(ServeError):
    """The model cannot be served. `retry` depends on the cause: another try helps after a network
    failure."""

    http_status = 503
    code = "model_load_failed"
    job_status = "MODEL_LOAD_FAILED"

    def __init__(self, message: str, *, retry: bool = False) -> None:
        super().__init__(message)
        self.retry = retry


class MachineUnfit(ModelLoadFailed):
    """This machine cannot serve the model: too little memory, a full disk, an old driver.

    `check` names what was checked, such as "gpu_memory".
    """

    def __init__(self, message: str, *, check: str = "machine") -> None:
        super().__init__(message)
        self.check = check


class LoaderKilled(ModelLoadFailed):
    """The loading process was killed, usually for lack of memory."""


class InternalError(ServeError):
    """A bug. The log has its cause, with the same request id."""


def as_serve_error(error: BaseException) -> ServeError:
    """Returns the `ServeError` for any exception.

    A `ServeError` is returned unchanged; for another exception the most specific class is used,
    with a fixed message.
    """
    if isinstance(error, ServeError):
        return error
    # Only code that has imported torch can raise its error, so no import is needed here.
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return OutOfMemory("The GPU ran out of memory; send a shorter prompt or fewer max_tokens.")
    if isinstance(error, TimeoutError):
        return DeadlinePassed("The request took longer than the server allows; try again.")
    return InternalError("An internal error occurred; please report it with the request id.")


def handle_error(error: Exception, request_id: str) -> ServeError:
    """Returns `as_serve_error(error)`. Logs an exception that is not a `ServeError`, with
    `request_id`.

    The log line has the exception's type and its stack frames. The exception's text, which may
    quote a user, is logged at DEBUG only.
    """
    serve_error = as_serve_error(error)
    if serve_error is not error:
        frames = traceback.extract_tb(error.__traceback__)[::-1]
        lines = " < ".join(f"{frame.name} ({frame.filename}:{frame.lineno})" for frame in frames)
        kind = type(error).__name__
        fields = {"request_id": request_id, "error": kind}
        log.error("request %s failed: %s in %s", request_id, kind, lines, extra={"fields": fields})
        log.debug("request %s failed", request_id, exc_info=error)
    return serve_error
