"""CORS: allows pages of other origins to call the API
(https://fetch.spec.whatwg.org/#http-cors-protocol)."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.api.request_id import ids_of
from serve_app.protocol.cors import EXPOSED, MAX_AGE_S, METHODS

ASK_S = 5.0
"""Maximum seconds for the answer to a preflight request of our own."""


def with_cors(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """Returns `app` with CORS headers for `origins`, the setting `ApiSettings.allowed_origins`."""
    return Cors(app, origins) if origins else app


async def origins_allowed_by(app: ASGIApp, scope: Scope) -> list[str]:
    """Returns the origin that `app` allows to read its answer to `scope`: the request's own, `*`,
    or none.

    `app` may be Serve's proxy, which sends requests to a process that knows the setting. So this
    function sends `app` a preflight request of the same origin, which costs no more than that.
    """
    origin = [each for each in scope["headers"] if each[0] == b"origin"]
    found: list[str] = []

    async def receive() -> Message:
        await asyncio.Event().wait()  # no body, and no client that could disconnect
        raise AssertionError

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            found.extend(Headers(raw=message["headers"]).getlist("access-control-allow-origin"))

    asked = [*origin, (b"access-control-request-method", b"POST")]
    if origin:
        with suppress(TimeoutError):  # Serve makes requests wait while it has no replica
            async with asyncio.timeout(ASK_S):
                await app({**scope, "method": "OPTIONS", "headers": asked}, receive, send)
    return found


class Cors:
    """Starlette's CORS middleware with our headers.

    Answers preflight requests without an API key, because browsers send no key with them. Adds the
    request's ids to these answers, as to other responses.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        self._cors = CORSMiddleware(
            app,
            allow_origins=origins,
            allow_methods=METHODS,
            allow_headers=["*"],
            expose_headers=EXPOSED,
            max_age=MAX_AGE_S,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_ids(message: Message) -> None:
            if message["type"] == "http.response.start":
                _, ids = ids_of(HTTPConnection(scope))
                own = [(name.encode(), value.encode()) for name, value in ids.items()]
                message["headers"] = [*message["headers"], *own]
            await send(message)

        is_options = scope["type"] == "http" and scope["method"] == "OPTIONS"
        is_preflight = is_options and _has(scope, b"origin", b"access-control-request-method")
        await self._cors(scope, receive, with_ids if is_preflight else send)


def _has(scope: Scope, *names: bytes) -> bool:
    return {name for name, _ in scope["headers"]}.issuperset(names)
