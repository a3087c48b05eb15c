"""Every error a user can meet, and the one place that turns an error into an answer.

    ServeError
    ├── InvalidRequest              400  the request must change
    │   ├── InvalidApiKey           401
    │   ├── ModelNotFound           404
    │   ├── RouteNotFound           404
    │   ├── MethodNotAllowed        405
    │   ├── ContextLengthExceeded   400
    │   ├── RequestTooLarge         413
    │   └── ResultTooLarge          413
    ├── Overloaded                       the same request may succeed later
    │   ├── QueueFull               429
    │   └── Draining                503
    ├── OutOfMemory                 503
    ├── DeadlinePassed              504
    ├── EngineDead                  503
    ├── ModelLoadFailed             503  retry: by cause
    │   ├── MachineUnfit                 another machine may serve it
    │   └── LoaderKilled                 by the kernel, usually for lack of memory
    └── InternalError               500  anything else

Raise one of these anywhere; the doors call `error_body` and nothing else. Everything that is not a
`ServeError` becomes an `InternalError`, whose message never repeats the original exception's text.
Knows neither HTTP libraries nor RunPod: statuses are plain numbers.
"""

import json
from typing import Any, ClassVar, TypedDict


class ErrorFields(TypedDict):
    """OpenAI's fields of an error, then the fields of a failed job, then our id of the request."""

    message: str
    type: str
    param: str | None
    code: str | None
    status: str
    """The job status, such as "OVERLOADED"; the README has the table."""
    retry: bool
    """Whether the same request may succeed when it is sent again."""
    request_id: str


class ErrorBody(TypedDict):
    """The JSON body of an error, the same at every endpoint."""

    error: ErrorFields


class ServeError(Exception):
    """An error with one clear sentence for the user.

    `message` says what to do and reaches the client verbatim; put nothing internal into it.
    `param` names the offending request field, `retry_after_s` (seconds) becomes `Retry-After`.
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

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own pickling forgets keyword arguments; errors may cross a process boundary.
        return (_rebuild, (type(self), self.message, self.__dict__))


def _rebuild(kind: type[ServeError], message: str, state: dict[str, Any]) -> ServeError:
    error = kind(message)
    error.__dict__.update(state)
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


class ModelNotFound(InvalidRequest):
    http_status = 404
    code = "model_not_found"


class RouteNotFound(InvalidRequest):
    http_status = 404
    code = "not_found"


class MethodNotAllowed(InvalidRequest):
    """`allow` is the method that the route takes."""

    http_status = 405

    def __init__(self, message: str, *, allow: str = "GET") -> None:
        super().__init__(message)
        self.allow = allow


class ContextLengthExceeded(InvalidRequest):
    """Prompt and `max_tokens` together do not fit into the model's context."""

    code = "context_length_exceeded"


class RequestTooLarge(InvalidRequest):
    http_status = 413
    code = "request_too_large"


class ResultTooLarge(InvalidRequest):
    """The platform takes no result of this size; a smaller request gets one."""

    http_status = 413
    code = "result_too_large"


class Overloaded(ServeError):
    """Refused for now; nothing was started, so the same request may be sent again."""

    type = "overloaded_error"
    job_status = "OVERLOADED"


class QueueFull(Overloaded):
    http_status = 429
    code = "queue_full"


class Draining(Overloaded):
    http_status = 503
    code = "draining"


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
    """Engine, replica or Ray is gone; another worker can answer."""

    http_status = 503
    code = "engine_dead"
    job_status = "CONNECTION_ERROR"


class ModelLoadFailed(ServeError):
    """The model cannot be served. `retry` is by cause: a lost network is worth another try."""

    http_status = 503
    code = "model_load_failed"
    job_status = "MODEL_LOAD_FAILED"

    def __init__(self, message: str, *, retry: bool = False) -> None:
        super().__init__(message)
        self.retry = retry


class MachineUnfit(ModelLoadFailed):
    """This machine cannot serve the model: too little memory, a full disk, an old driver.

    `check` says in a word what was looked at, such as "gpu_memory".
    """

    def __init__(self, message: str, *, check: str = "machine") -> None:
        super().__init__(message)
        self.check = check


class LoaderKilled(ModelLoadFailed):
    """The process that loads the model was killed, usually for lack of memory."""


class InternalError(ServeError):
    """A bug of ours. The log has the cause beside the same request id."""


def as_serve_error(error: BaseException) -> ServeError:
    """The `ServeError` that stands for `error`: itself, or the nearest kind without its text."""
    if isinstance(error, ServeError):
        return error
    # By name, so that this module never imports torch.
    if type(error).__name__ == "OutOfMemoryError":
        return OutOfMemory("The GPU ran out of memory; send a shorter prompt or fewer max_tokens.")
    if isinstance(error, TimeoutError):
        return DeadlinePassed("The request took longer than the server allows; try again.")
    return InternalError("An internal error occurred; please report it with the request id.")


def error_body(error: BaseException, request_id: str) -> ErrorBody:
    """The body that every endpoint sends for `error`."""
    known = as_serve_error(error)
    return {
        "error": {
            "message": known.message,
            "type": known.type,
            "param": known.param,
            "code": known.code,
            "status": known.job_status,
            "retry": known.retry,
            "request_id": request_id,
        }
    }


def job_error(body: ErrorBody) -> dict[str, str]:
    """What a RunPod handler yields to fail its job: `{"error": "<body as one JSON string>"}`.

    A string, because the SDK passes anything else through `str()` and clients would get a
    Python repr.
    """
    return {"error": json.dumps(body)}
