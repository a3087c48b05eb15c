"""The HTTP ingress: API keys, request ids, status codes, and one `Call` for each request.

Starlette routes by the table in `routes.py`. Each request becomes a `Call`, and each `Reply` a
response.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeVar

from starlette import routing
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from serve_app.api import origin, routes
from serve_app.api.cors import Cors
from serve_app.api.error_response import error_response
from serve_app.api.event_stream import EventStream
from serve_app.api.guard import ARRIVED, Guard
from serve_app.api.metrics.metrics import NO_ROUTE
from serve_app.api.request_id import ids_of, path_of
from serve_app.api.route import Route
from serve_app.error_body import error_body
from serve_app.protocol import json_pieces
from serve_app.protocol.call import (
    TRACEPARENT,
    BatchReply,
    Call,
    JsonObject,
    JsonReply,
    Reply,
    StreamReply,
    TextReply,
)
from serve_app.protocol.key_account import KeyAccount

if TYPE_CHECKING:
    from serve_app.api.server import MixtralServer

log = logging.getLogger(__name__)

CLIENT_LEFT = 499
"""nginx's status in access logs for a client that closed its connection."""
T = TypeVar("T")
GetServer = Callable[[], "MixtralServer"]


def create_app(get_server: GetServer, allowed_origins: Sequence[str] = ()) -> Starlette:
    """Returns the ASGI app in front of the server.

    `get_server` returns the server, and is called for each request. A client that closes a stream
    ends its request. During an answer that is not streamed, uvicorn does not notice a closed
    connection; Ray Serve does, and cancels the request.
    """
    # Starlette tries one route after another, so those with the most requests come first.
    table: list[routing.BaseRoute] = [
        routing.Route(route.path, Endpoint(get_server, route).response, methods=[route.method])
        for route in sorted(routes.ROUTES, key=attrgetter("generates"), reverse=True)
    ]
    # Any other path or method, so that its error has our form.
    unknown = Endpoint(get_server)
    table.append(routing.Route("/{path:path}", unknown.response, methods=[]))

    async def no_path(request: Request, _: Exception) -> Response:
        # `OPTIONS *` has no path that a route could match.
        return await unknown.response(request)

    middleware = [Middleware(Guard)]
    if allowed_origins:
        middleware.append(Middleware(Cors, allowed_origins))
    return Starlette(
        routes=table, middleware=middleware, exception_handlers={HTTPException: no_path}
    )


class Endpoint:
    """Answers the requests of one route. Without a route, answers requests for unknown paths."""

    def __init__(self, get_server: GetServer, route: Route | None = None) -> None:
        self._get_server = get_server
        self._route = route
        self._handler = NO_ROUTE if route is None else route.path
        # Only a path that ends with a parameter has to be read from each request.
        self._path = None if route is None or "{" in route.path else route.path

    async def response(self, request: Request) -> Response:
        """Returns the response to one request. Errors are responses too."""
        server = self._get_server()
        server.loop_lag.start()
        request_id, headers = ids_of(request)
        path = self._path or path_of(request.scope)
        account: KeyAccount | None = None
        try:
            route = self._route or routes.find(path)
            if server.keys.are_needed and (route is None or route.needs_key):
                account = server.keys.account_of(request.headers)
            reply = await self._reply(request, server, path, request_id, account)
            headers |= account.headers() if account is not None else {}
            response = await _response(reply, server, request_id, path, self._route, headers)
        except ClientDisconnect:
            log.debug(
                "request %s: the client disconnected before its body had arrived",
                request_id,
                extra={"fields": {"request_id": request_id}},
            )
            response = Response(status_code=CLIENT_LEFT)
        except Exception as raised:
            headers |= account.headers() if account is not None else {}
            response = error_response(server.failure(raised, request_id), request_id, path, headers)
        server.metrics.http_responses[self._handler, response.status_code] += 1
        return response

    async def _reply(
        self,
        request: Request,
        server: "MixtralServer",
        path: str,
        request_id: str,
        account: KeyAccount | None,
    ) -> Reply:
        """Reads the body of a request. Returns the reply to it."""
        # The HTTP server leaves out the body of the response to HEAD.
        method = "GET" if request.method == "HEAD" else request.method
        route = self._route or routes.match(method, path)  # raises the error
        # Before the body is read: a refusal must cost as little as possible.
        if route.method == "POST" and "origin" in request.headers:
            api = server.settings.api
            origin.require_allowed(request.headers, api.allowed_origins, api.needs_key)
        server.require_room(route, account)
        traced = None if server.tracing is None else request.headers.get(TRACEPARENT)
        about = request_id, request.scope[ARRIVED], account, traced
        if route.method == "GET":
            return await route.handler(server, Call(method, path, None, *about))
        end = account.take_request() if account and route.generates else None
        try:
            body = await server.bodies.read(request.headers, request.stream())
            reply = await route.handler(server, Call(method, path, body, *about))
        except BaseException:
            if end is not None:
                end()
            raise
        if end is None:
            return reply
        match reply:
            case StreamReply(chunks):
                return replace(reply, chunks=_until_closed(chunks, end))
            case BatchReply(items):
                return BatchReply(_until_closed(items, end))
        end()
        return reply


async def _until_closed(
    items: AsyncGenerator[T, None], end: Callable[[], None]
) -> AsyncGenerator[T, None]:
    """Yields the items, and calls `end` when they end or are closed."""
    try:
        async with aclosing(items):
            async for item in items:
                yield item
    finally:
        end()


async def _response(
    reply: Reply,
    server: "MixtralServer",
    request_id: str,
    path: str,
    route: Route | None,
    headers: dict[str, str],
) -> Response:
    """Returns the HTTP response for `reply`."""
    match reply:
        case StreamReply(chunks):
            assert route is not None

            def last_event(error: Exception, last: JsonObject) -> Mapping[str, Any]:
                failure = server.failure(error, request_id)
                return route.error_event(error_body(failure, request_id, path), last)

            stream = EventStream(chunks, last_event, headers, route.stream_end)
            await stream.begin()
            return stream
        case TextReply(text, media_type, own):
            return Response(text, headers={**headers, **own}, media_type=media_type)
        case JsonReply(body, status, is_large=True):
            content = await asyncio.to_thread(json_pieces.encode, body)
            return Response(content, status, headers, "application/json")
        case JsonReply(body, status):
            return JSONResponse(body, status, headers)
        case BatchReply(items):
            async with aclosing(items):
                (last,) = [item async for item in items if "body" in item]
            return JSONResponse(last["body"], last["status"], headers)
