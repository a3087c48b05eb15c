"""The table of routes.

HTTP routing, API keys, the parsing of jobs, answers before the load and the start banner use it.
Ray Serve's access log and metrics have the same paths.
"""

import re
from typing import TYPE_CHECKING

from serve_app.api import chat, completions, messages, pages, prompt, responses, status, tokens
from serve_app.api.route import Route
from serve_app.errors import MethodNotAllowed, RouteNotFound
from serve_app.protocol.call import Call, Reply
from serve_app.protocol.field_errors import printable
from serve_app.protocol.responses_api.events import error_event

if TYPE_CHECKING:
    from serve_app.api.served_model import ServedModel


async def _describe(served: "ServedModel", call: Call) -> Reply:
    """Returns the description of all routes."""
    return await pages.describe(served, ROUTES)


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
    Route("GET", "/openapi.json", _describe, needs_key=False),
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
    """Returns advice for a client that requested an unknown path.

    The usual mistake is a base URL with `/v1` instead of one without it, or the reverse.
    """
    plain = re.sub("/+", "/", path).rstrip("/").lower()
    for candidate in (plain, f"/v1{plain}", plain.removeprefix("/v1")):
        if find(candidate) is not None:
            return f"use {printable(candidate)}"
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
