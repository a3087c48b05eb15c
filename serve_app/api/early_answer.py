"""EarlyAnswer: an ASGI middleware that answers requests which need only the server's state.

The middleware wraps Serve's HTTP server in a replica. It answers `/ping`, and refuses a request
without a valid key or a free place in about 0.1 ms, before Serve parses the headers or counts the
request. The ingress repeats these checks for servers without this middleware. In a process without
a model, such as Serve's proxy, the middleware passes every request on.

Answers to `/ping` and refusals of a full queue have the header `PLACES`. Its numbers let HAProxy
refuse further requests itself (`node/haproxy_refusals.py`). HAProxy reports how many in the header
`REFUSED` of the next request that it passes on.
"""

from typing import TYPE_CHECKING

from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.api import routes
from serve_app.api.cors import with_cors
from serve_app.api.error_response import error_response
from serve_app.api.request_id import ids_before_serve, path_of
from serve_app.errors import QueueFull, ServeError
from serve_app.protocol.header_names import PLACES, REFUSED

if TYPE_CHECKING:
    from serve_app.api.server import MixtralServer

_servers: "list[MixtralServer]" = []


def serves(server: "MixtralServer") -> None:
    """Registers `server` as the server of this process."""
    _servers[:] = [server]


def allowed_origins() -> list[str]:
    """Returns `ApiSettings.allowed_origins` of this process's server; `[]` without a server."""
    return _servers[0].settings.api.allowed_origins if _servers else []


class EarlyAnswer:
    """Answers requests early if possible, and passes the others to `app`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = None
        if scope["type"] == "http" and _servers:
            answer = _answer(_servers[0], HTTPConnection(scope))
        app = self._app if answer is None else with_cors(answer, allowed_origins())
        await app(scope, receive, send)


def _answer(server: "MixtralServer", request: HTTPConnection) -> JSONResponse | None:
    """Returns the answer to `request` if it needs neither a body nor the engine, otherwise None."""
    method, route = request.scope["method"], routes.find(path_of(request.scope))
    if route is None:
        return None
    is_ping = route.path == "/ping" and method in ("GET", "HEAD")
    if not is_ping and (method != "POST" or route.method != "POST"):
        return None
    if route.generates and (refused := request.headers.get(REFUSED, "0")).isdecimal():
        server.metrics.refused(int(refused[:9]))
    try:
        account = None
        if route.needs_key and server.keys.are_needed:
            account = server.keys.account_of(request.headers)
        server.require_room(route, account)
    except ServeError as error:
        refusal = _refusal(server, request, error)
        server.metrics.http_responses[route.path, refusal.status_code] += 1
        return refusal
    if not is_ping:
        return None
    _, headers = ids_before_serve(request)
    return JSONResponse(*server.ping(), headers=headers | _places(server))


def _refusal(server: "MixtralServer", request: HTTPConnection, error: ServeError) -> JSONResponse:
    request_id, headers = ids_before_serve(request)
    serve_error = server.failure(error, request_id)
    if isinstance(serve_error, QueueFull):
        headers |= _places(server)
    return error_response(serve_error, request_id, request.scope["path"], headers)


def _places(server: "MixtralServer") -> dict[str, str]:
    places = server.places()
    times = (round(seconds * 1e6) for seconds in (places.place_s, places.full_s))
    return {PLACES: ",".join(map(str, (places.num_places, *times, places.min_s)))}
