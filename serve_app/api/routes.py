"""The table of routes.

HTTP routing, API keys, the parsing of jobs, answers before the load and the start banner use it.
Ray Serve's access log and metrics have the same paths.
"""

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from serve_app.api import chat, completions, messages, pages, prompt, responses, status, tokens
from serve_app.error_body import ErrorBody
from serve_app.errors import MethodNotAllowed, RouteNotFound
from serve_app.protocol import sse
from serve_app.protocol.call import Call, JsonObject, Reply
from serve_app.protocol.field_errors import printable
from serve_app.protocol.responses_api.events import error_event

if TYPE_CHECKING:
    from serve_app.api.server import MixtralServer

Handler = Callable[["MixtralServer", Call], Awaitable[Reply]]
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


ROUTES = (
    Route("GET", "/health", status.health, needs_key=False, is_open_before_load=True),
    Route("GET", "/ping", status.ping, needs_key=False),
    Route("GET", "/metrics", status.show_metrics, needs_key=False, is_open_before_load=True),
    Route("GET", status.MODELS, status.models),
    Route("GET", f"{status.MODELS}/{{id:path}}", status.model),
    Route("GET", "/version", status.version),
    Route("GET", "/tokenizer_info", tokens.tokenizer_info),
    Route("POST", "/v1/chat/completions", chat.create, generates=True),
    Route("POST", "/v1/completions", completions.create, generates=True),
    Route(
        "POST",
        "/v1/responses",
        responses.create,
        generates=True,
        stream_end=b"",
        error_event=error_event,
    ),
    Route("POST", "/v1/messages", messages.create, generates=True, stream_end=b""),
    Route("POST", "/v1/messages/count_tokens", messages.count_tokens),
    Route("POST", "/prompt", prompt.create, generates=True),
    Route("POST", "/tokenize", tokens.tokenize),
    Route("POST", "/detokenize", tokens.detokenize),
    Route("GET", "/", pages.page, needs_key=False),
    Route("GET", "/docs", pages.docs, needs_key=False),
    Route("GET", "/openapi.json", pages.describe, needs_key=False),
)

_EXACT = {route.path: route for route in ROUTES if "{" not in route.path}
_PREFIXES = {route.path.partition("{")[0]: route for route in ROUTES if "{" in route.path}


def find(path: str) -> Route | None:
    """Returns the route of `path`; None if there is none."""
    if (route := _EXACT.get(path)) is not None:
        return route
    for prefix, route in _PREFIXES.items():
        if path.startswith(prefix) and path != prefix:
            return route
    return None


def _advice(path: str) -> str:
    """Returns what a client should do that has asked for an unknown path.

    Most of them have a base URL with or without `/v1` where the other one is meant.
    """
    plain = re.sub("/+", "/", path).rstrip("/").lower()
    for each in (plain, f"/v1{plain}", plain.removeprefix("/v1")):
        if find(each) is not None:
            return f"use {printable(each)}"
    return "GET /docs describes the routes"


def match(method: str, path: str) -> Route:
    """Returns the route of a call. Raises `RouteNotFound` or `MethodNotAllowed`."""
    route = find(path)
    if route is None:
        raise RouteNotFound(f"There is no route {printable(path)}; {_advice(path)}.")
    if route.method != method:
        raise MethodNotAllowed(
            f"{printable(path)} takes {route.method}, not {printable(method)}.", allow=route.allow
        )
    return route
