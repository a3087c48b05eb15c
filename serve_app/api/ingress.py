"""The HTTP ingress: API keys, request bodies, status codes and server-sent events.

Starlette routes by the table in `routes.py`. Each request becomes a `Call`, and each `Reply` a
response.
"""

import asyncio
import hmac
import json
import logging
import uuid
from collections.abc import Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, NoReturn

from starlette import routing
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Scope, Send

from serve_app.api import routes
from serve_app.config.sections import ApiSettings
from serve_app.errors import InvalidApiKey, InvalidRequest, RequestTooLarge, error_body
from serve_app.protocol import sse
from serve_app.protocol.call import (
    BatchReply,
    Call,
    JsonObject,
    JsonReply,
    Reply,
    StreamReply,
    TextReply,
)

if TYPE_CHECKING:
    from serve_app.api.server import MixtralServer

log = logging.getLogger(__name__)

MAX_BODY_ON_LOOP = 100_000
"""Bytes; larger bodies are parsed in a thread."""

CLIENT_LEFT = 499
"""nginx's status in access logs for a client that closed its connection."""

GetServer = Callable[[], "MixtralServer"]


def create_app(get_server: GetServer) -> Starlette:
    """The ASGI app in front of the server that `get_server` returns, called for each request.

    A client that closes a stream ends its request. While an answer that is not streamed is
    generated, uvicorn alone does not notice a closed connection; Ray Serve does, and cancels.
    """
    table: list[routing.BaseRoute] = [
        routing.Route(route.path, Endpoint(get_server, route).response, methods=[route.method])
        for route in routes.ROUTES
    ]
    # Any other path or method, so that its error has our form.
    unknown = Endpoint(get_server)
    table.append(routing.Route("/{path:path}", unknown.response, methods=[]))

    async def no_path(request: Request, _: Exception) -> Response:
        # `OPTIONS *` has no path that a route could match.
        return await unknown.response(request)

    return Starlette(routes=table, exception_handlers={HTTPException: no_path})


class Endpoint:
    """Answers the requests of one route, or, without a route, all requests that have none."""

    def __init__(self, get_server: GetServer, route: routes.Route | None = None) -> None:
        self._get_server = get_server
        self._route = route

    async def response(self, request: Request) -> Response:
        """The response to one request; its errors are responses too."""
        server = self._get_server()
        request_id = uuid.uuid4().hex
        headers = _id_headers(request, request_id)
        try:
            path = _path(request.scope)
            route = self._route or routes.find(path)
            if server.settings.api.keys is not None and (route is None or route.needs_key):
                _check_key(request, server.settings.api)
            body = await _json_body(request, server.settings.api.max_body_bytes)
            # The HTTP server leaves out the body of the response to HEAD.
            method = "GET" if request.method == "HEAD" else request.method
            reply = await server.answer(Call(method, path, body, request_id), self._route)
            return await _response(reply, server, request_id, headers)
        except ClientDisconnect:
            log.debug("request %s: the client left before its body was here", request_id)
            return Response(status_code=CLIENT_LEFT)
        except Exception as raised:
            error = server.failure(raised, request_id)
            headers |= error.headers
            return JSONResponse(error_body(error, request_id), error.http_status, headers)


async def _response(
    reply: Reply, server: "MixtralServer", request_id: str, headers: dict[str, str]
) -> Response:
    match reply:
        case StreamReply():
            return EventStream(reply, server, request_id, headers)
        case TextReply(text, media_type):
            return Response(text, headers=headers, media_type=media_type)
        case JsonReply(body, status):
            return JSONResponse(body, status, headers)
        case BatchReply(items):
            async with aclosing(items):
                (last,) = [item async for item in items if "body" in item]
            return JSONResponse(last["body"], last["status"], headers)


class EventStream(StreamingResponse):
    """Response chunks as server-sent events, then `[DONE]`, or the error as the last event.

    However it ends, it closes the chunks, which cancels the request.
    """

    def __init__(
        self, reply: StreamReply, server: "MixtralServer", request_id: str, headers: dict[str, str]
    ) -> None:
        self._next: JsonObject | None = reply.first
        self._rest = reply.rest
        self._is_over = False
        self._server, self._request_id = server, request_id
        # Proxies that buffer would hold the tokens back.
        headers = {**headers, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__((), headers=headers, media_type=sse.MEDIA_TYPE)

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self._rest):
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            while not self._is_over:
                event = await self._event()
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _event(self) -> bytes:
        """Waits for the next event. Errors of the connection are not raised here."""
        try:
            chunk, self._next = self._next, None
            return sse.event(await anext(self._rest) if chunk is None else chunk)
        except StopAsyncIteration:
            self._is_over = True
            return sse.DONE
        except Exception as raised:
            self._is_over = True
            error = self._server.failure(raised, self._request_id)
            return sse.event(error_body(error, self._request_id))


def _id_headers(request: Request, request_id: str) -> dict[str, str]:
    """The headers with the ids of a request: ours, and the client's.

    Ray Serve's proxy adds an `x-request-id` to requests that have none, and sends it back itself. A
    second header of that name would reach clients as one joined value.
    """
    given = request.headers.get("x-request-id")
    if given is None:
        return {"x-request-id": request_id, "x-mixtral-request-id": request_id}
    log.info("request %s has the client's id %.128r", request_id, given)
    return {"x-mixtral-request-id": request_id}


def _path(scope: Scope) -> str:
    """The path below the prefix that this app is mounted at."""
    path: str = scope["path"]
    prefix: str = scope.get("root_path", "").rstrip("/")
    return path.removeprefix(prefix) if path.startswith(f"{prefix}/") else path


def _check_key(request: Request, settings: ApiSettings) -> None:
    """Raises `InvalidApiKey` where the request has none of the keys as its bearer token."""
    assert settings.keys is not None
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    given = given.strip() if scheme.lower() == "bearer" else ""
    keys = [key.strip() for key in settings.keys.get_secret_value().split(",") if key.strip()]
    # Every key is compared, each in constant time, so that the time reveals no key.
    matches = [hmac.compare_digest(given.encode("latin-1"), key.encode()) for key in keys]
    if not any(matches):
        raise InvalidApiKey("Send a valid API key as `Authorization: Bearer <key>`.")


async def _json_body(request: Request, max_bytes: int) -> Any:
    """The JSON value of the body; None for an empty body.

    Raises `RequestTooLarge` as soon as the body is known to be too large, and `InvalidRequest`.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > max_bytes:
        raise _too_large(max_bytes)
    parts: list[bytes] = []
    num_bytes = 0
    async for part in request.stream():
        num_bytes += len(part)
        if num_bytes > max_bytes:
            raise _too_large(max_bytes)
        parts.append(part)
    body = b"".join(parts)
    return await asyncio.to_thread(_parsed, body) if num_bytes > MAX_BODY_ON_LOOP else _parsed(body)


def _too_large(max_bytes: int) -> RequestTooLarge:
    return RequestTooLarge(f"The body is larger than the {max_bytes} bytes that are allowed.")


def _parsed(body: bytes) -> Any:
    """The JSON value of a body; None for an empty body."""
    if not body.strip():
        return None
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise InvalidRequest("The body is not UTF-8.") from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(
            f"The body is not valid JSON: line {error.lineno}, column {error.colno}."
        ) from None
    except (ValueError, RecursionError):
        raise InvalidRequest(
            "The body holds a number or a nesting that JSON readers cannot take."
        ) from None


def _no_constant(name: str) -> NoReturn:
    raise InvalidRequest(f"The body is not valid JSON: {name} is not a JSON number.")
