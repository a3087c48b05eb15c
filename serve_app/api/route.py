"""Route: one path of the API, its method and the function that answers it."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from serve_app.error_body import ErrorBody
from serve_app.protocol import sse
from serve_app.protocol.call import Call, JsonObject, Reply

if TYPE_CHECKING:
    from serve_app.api.served_model import ServedModel

Handler = Callable[["ServedModel", Call], Awaitable[Reply]]
"""A function that answers a call. It may raise any exception, which `MixtralServer.failure`
converts to an error."""


def _only_body(body: ErrorBody, _last: JsonObject) -> ErrorBody:
    return body


@dataclass(frozen=True, slots=True)
class Route:
    """One path and its method."""

    method: Literal["GET", "POST"]
    """GET includes HEAD over HTTP."""
    path: str
    """The path in Starlette's syntax. Only its end may be a parameter."""
    handler: Handler
    needs_key: bool = True
    """Whether HTTP clients need an API key; monitoring has none."""
    generates: bool = False
    """Whether its requests need a place in the engine's queue, and are refused when it is full."""
    is_open_before_load: bool = False
    """Whether a worker answers it before its model is loaded, with fewer fields."""
    stream_end: bytes = sse.DONE
    """The server-sent event after a stream's last response chunk."""
    error_event: Callable[[ErrorBody, JsonObject], Mapping[str, Any]] = _only_body
    """Returns the last event of a failed stream from the error body and the last response chunk,
    which is {} if there was none."""

    @property
    def allow(self) -> str:
        """The value of the header `Allow`."""
        return "GET, HEAD" if self.method == "GET" else self.method
