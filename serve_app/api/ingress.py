"""The HTTP door: routes, status codes, SSE bytes, API keys. Translates and does nothing else.

Every request becomes a `Call` and every `Reply` a response, so a route exists here as soon as the
server has it. Knows no tokens and no Ray.
"""

import asyncio
import hmac
import json
import logging
import uuid
from collections.abc import Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, NoReturn

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from serve_app.api.metrics import Metrics
from serve_app.api.routes import PATHS, known
from serve_app.config.sections import ApiSettings
from serve_app.errors import (
    InvalidApiKey,
    InvalidRequest,
    MethodNotAllowed,
    RequestTooLarge,
    RouteNotFound,
    ServeError,
    error_body,
)
from serve_app.protocol import sse
from serve_app.protocol.call import (
    BatchReply,
    Call,
    JsonObject,
    JsonReply,
    StreamReply,
    TextReply,
)

if TYPE_CHECKING:
    from serve_app.api.server import MixtralServer

log = logging.getLogger(__name__)

BODY_ON_LOOP = 100_000
"""Bytes; larger bodies are parsed in a thread."""

CLIENT_LEFT = 499
"""nginx's status in access logs; nobody is there to hear it."""

OPEN_ROUTES = frozenset({"/health", "/ping", "/metrics"})
"""Routes that need no key: whoever watches the server has none."""


def create_app(get_server: Callable[[], "MixtralServer"]) -> FastAPI:
    """The ASGI app in front of the server that `get_server` returns, asked at each request.

    Whoever leaves a stream ends their request. Whoever leaves before an answer that is not
    streamed is noticed by Serve, which cancels this app; uvicorn alone does not, and the answer is
    made to its end.
    """
    endpoint = _Endpoint(get_server)
    # All of them go the same way; those that exist are named for Serve's access log and metrics.
    routes: list[BaseRoute] = [Route(path, endpoint) for path in (*PATHS, "/{path:path}")]
    app = FastAPI(routes=routes, docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(HTTPException)
    async def unrouted(request: Request, raised: HTTPException) -> Response:
        # `OPTIONS *`, which is no path.
        error = RouteNotFound("There is no such route.")
        return _failed(error, uuid.uuid4().hex, {}, get_server().metrics)

    return app


class _Endpoint:
    """An ASGI app and no function, so that requests of any method come here."""

    def __init__(self, get_server: Callable[[], "MixtralServer"]) -> None:
        self._get_server = get_server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await _respond(Request(scope, receive, send), self._get_server())
        await response(scope, receive, send)


async def _respond(request: Request, server: "MixtralServer") -> Response:
    request_id = uuid.uuid4().hex
    headers = _id_headers(request, request_id)
    try:
        path, limits = _path(request.scope), server.settings.api
        if path not in OPEN_ROUTES:
            _check_key(request, limits)
        content = await _bounded_body(request, limits.max_body_bytes)
        is_long = len(content) > BODY_ON_LOOP
        body = await asyncio.to_thread(_parsed, content) if is_long else _parsed(content)
        # HEAD is GET whose body the HTTP server leaves out.
        method = "GET" if request.method == "HEAD" else request.method
        reply = await server.answer(Call(method, path, body, request_id))
        match reply:
            case StreamReply():
                return _EventStream(reply, request_id, headers, server.metrics)
            case TextReply(text, media_type):
                return Response(text, headers=headers, media_type=media_type)
            case BatchReply(items):
                async with aclosing(items):
                    bodies = [item async for item in items if "body" in item]
                return _json(bodies[-1]["body"], bodies[-1]["status"], headers)
            case JsonReply(body, status):
                return _json(body, status, headers)
    except ClientDisconnect:
        log.debug("request %s: the client left before its body was here", request_id)
        return Response(status_code=CLIENT_LEFT)
    except Exception as error:
        return _failed(error, request_id, headers, server.metrics)


def _path(scope: Scope) -> str:
    """The path below the prefix that this app is mounted at."""
    path: str = scope["path"]
    prefix: str = scope.get("root_path", "").rstrip("/")
    return path.removeprefix(prefix) if path.startswith(f"{prefix}/") else path


class _EventStream(StreamingResponse):
    """Response chunks as server-sent events, then `[DONE]`, or the error as the last event.

    However it ends, it closes the chunks, which cancels the request.
    """

    def __init__(
        self, reply: StreamReply, request_id: str, headers: dict[str, str], metrics: Metrics
    ) -> None:
        self._first: JsonObject | None = reply.first
        self._rest = reply.rest
        self._is_over = False
        self._request_id, self._metrics = request_id, metrics
        # Proxies that buffer would hold the tokens back.
        headers = {**headers, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__((), headers=headers, media_type=sse.MEDIA_TYPE)

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self._rest):
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            while not self._is_over:
                event = await self._next_event()
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _next_event(self) -> bytes:
        try:
            if (chunk := self._first) is None:
                chunk = await anext(self._rest)
            self._first = None
            return sse.event(chunk)
        except StopAsyncIteration:
            self._is_over = True
            return sse.DONE
        except Exception as error:
            self._is_over = True
            told = known(error, self._request_id)
            self._metrics.error(told)
            return sse.event(error_body(told, self._request_id))


def _json(body: Any, status: int, headers: dict[str, str]) -> Response:
    content = json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Response(content, status, headers, media_type="application/json")


def _failed(
    error: Exception, request_id: str, headers: dict[str, str], metrics: Metrics
) -> Response:
    """The one way an error leaves by HTTP."""
    told = known(error, request_id)
    metrics.error(told)
    headers = {**headers, **_headers_of(told)}
    return _json(error_body(told, request_id), told.http_status, headers)


def _headers_of(error: ServeError) -> dict[str, str]:
    """What HTTP says about an error besides its status."""
    if isinstance(error, MethodNotAllowed):
        return {"Allow": "GET, HEAD" if error.allow == "GET" else error.allow}
    if isinstance(error, InvalidApiKey):
        return {"WWW-Authenticate": "Bearer"}
    if error.retry_after_s is not None:
        return {"Retry-After": str(error.retry_after_s)}
    return {}


def _id_headers(request: Request, request_id: str) -> dict[str, str]:
    """Our id, and the client's.

    Ray Serve's proxy gives each request an `x-request-id` where the client has not, and answers
    with it itself; a second header of that name would reach clients as one joined value.
    """
    given = request.headers.get("x-request-id")
    if given is None:
        return {"x-request-id": request_id, "x-mixtral-request-id": request_id}
    log.info("request %s is %.128r to whoever sent it", request_id, given)
    return {"x-mixtral-request-id": request_id}


def _check_key(request: Request, limits: ApiSettings) -> None:
    if limits.keys is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    given = given.strip() if scheme.lower() == "bearer" else ""
    keys = [key.strip() for key in limits.keys.get_secret_value().split(",") if key.strip()]
    # Every key is compared, each in constant time, so that the time tells nothing.
    matches = [hmac.compare_digest(given.encode("latin-1"), key.encode()) for key in keys]
    if not any(matches):
        raise InvalidApiKey("Send a valid API key as `Authorization: Bearer <key>`.")


async def _bounded_body(request: Request, limit: int) -> bytes:
    """The body; raises `RequestTooLarge` as soon as it is known to be too large."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > limit:
        raise _too_large(limit)
    parts: list[bytes] = []
    num_bytes = 0
    async for part in request.stream():
        num_bytes += len(part)
        if num_bytes > limit:
            raise _too_large(limit)
        parts.append(part)
    return b"".join(parts)


def _too_large(limit: int) -> RequestTooLarge:
    return RequestTooLarge(f"The body is larger than the {limit} bytes that are allowed.")


def _parsed(body: bytes) -> Any:
    """The JSON value of the body; None of an empty one."""
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
