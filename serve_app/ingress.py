"""The HTTP door: routes, status codes, SSE bytes, API keys. Translates and does nothing else.

Every request becomes a `Call` and every `Reply` a response, so a route exists here as soon as the
server has it. Knows no tokens and no Ray.
"""

import hmac
import json
import logging
import uuid
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Any, NoReturn

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from serve_app.errors import (
    InternalError,
    InvalidApiKey,
    InvalidRequest,
    MethodNotAllowed,
    RequestTooLarge,
    ServeError,
    as_serve_error,
    error_body,
)
from serve_app.protocol import sse
from serve_app.protocol.call import Call, Reply
from serve_app.routes import PATHS
from serve_app.settings import ApiSettings

if TYPE_CHECKING:
    from serve_app.server import MixtralServer

log = logging.getLogger(__name__)

METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"]
OPEN_ROUTES = frozenset({"/health", "/ping", "/metrics"})
"""Routes that need no key: whoever watches the server has none."""


def create_app(get_server: Callable[[], "MixtralServer"]) -> FastAPI:
    """The ASGI app in front of the server that `get_server` returns, asked at each request."""

    async def endpoint(request: Request) -> Response:
        return await _respond(request, get_server())

    # All of them go the same way; those that exist are named for Serve's access log and metrics.
    routes: list[BaseRoute] = [
        Route(path, endpoint, methods=METHODS) for path in (*PATHS, "/{path:path}")
    ]
    app = FastAPI(routes=routes, docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        # A method that is not even in METHODS never reaches the route above.
        unknown = MethodNotAllowed("This method is not supported.")
        return _failed(unknown, f"req_{uuid.uuid4().hex}", {})

    return app


async def _respond(request: Request, server: "MixtralServer") -> Response:
    request_id = uuid.uuid4().hex
    headers = _id_headers(request, request_id)
    try:
        path, limits = request.scope["path"], server.settings.api
        if path not in OPEN_ROUTES:
            _check_key(request, limits)
        body = _parsed(await _bounded_body(request, limits.max_body_bytes))
        reply = await server.answer(Call(request.method, path, body, request_id))
    except Exception as error:
        return _failed(error, request_id, headers)
    headers |= reply.headers
    if reply.chunks is not None:
        return _EventStream(reply.chunks, request_id, headers)
    return _json(reply, headers)


class _EventStream(StreamingResponse):
    """Chunks as server-sent events. However it ends, the chunks are closed: that cancels."""

    def __init__(
        self, chunks: AsyncGenerator[dict[str, Any], None], request_id: str, headers: dict[str, str]
    ) -> None:
        self._chunks = chunks
        # Proxies that buffer would hold the tokens back.
        headers = {**headers, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_events(chunks, request_id), headers=headers, media_type=sse.MEDIA_TYPE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._chunks.aclose()


async def _events(
    chunks: AsyncGenerator[dict[str, Any], None], request_id: str
) -> AsyncGenerator[str, None]:
    """The events, then `[DONE]`; or the error as the last event, and no `[DONE]`."""
    try:
        async for chunk in chunks:
            yield sse.event(chunk)
    except ServeError as error:
        yield sse.event(error_body(error, request_id))
    else:
        yield sse.DONE


def _json(reply: Reply, headers: dict[str, str]) -> Response:
    content = json.dumps(reply.body, ensure_ascii=False, separators=(",", ":"))
    return Response(content, reply.status, headers, media_type="application/json")


def _failed(error: Exception, request_id: str, headers: dict[str, str]) -> Response:
    """The one way an error leaves by HTTP."""
    known = as_serve_error(error)
    if isinstance(known, InternalError) and known is not error:
        log.exception("request %s failed at the door", request_id, exc_info=error)
    if known.retry_after_s is not None:
        headers = {**headers, "Retry-After": str(known.retry_after_s)}
    return _json(Reply(error_body(known, request_id), status=known.http_status), headers)


def _id_headers(request: Request, request_id: str) -> dict[str, str]:
    """Our id, and the client's.

    Ray Serve's proxy gives each request an `x-request-id` where the client has not, and answers
    with it itself; a second header of that name would reach clients as one joined value.
    """
    given = request.headers.get("x-request-id")
    if given is None:
        return {"x-request-id": request_id, "x-mixtral-request-id": request_id}
    log.debug("request %s is %.128r to whoever sent it", request_id, given)
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
