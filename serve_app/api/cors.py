"""CORS: allows pages of other origins to call the API
(https://fetch.spec.whatwg.org/#http-cors-protocol)."""

from starlette.middleware.cors import CORSMiddleware
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.api.request_id import ANTHROPIC_ID, CLIENT_ID, OUR_ID, ids_of
from serve_app.protocol.allowance import HEADERS

EXPOSED = [CLIENT_ID, OUR_ID, ANTHROPIC_ID, "Retry-After", *HEADERS]
"""Response headers that a page may read, in addition to the standard ones."""


def with_cors(app: ASGIApp, origins: str | None) -> ASGIApp:
    """Returns `app` with CORS headers for `origins`, the setting `api.cors_origins`."""
    return app if origins is None else Cors(app, origins)


class Cors:
    """Starlette's CORS middleware for the setting `api.cors_origins`.

    It answers preflight requests itself, without an API key, because browsers send none with them.
    These answers have the request's ids, as other responses do.
    """

    def __init__(self, app: ASGIApp, origins: str) -> None:
        """`origins` are separated by commas."""
        self._cors = CORSMiddleware(
            app,
            allow_origins=[origin.strip() for origin in origins.split(",") if origin.strip()],
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=EXPOSED,
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
