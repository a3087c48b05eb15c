"""Guard: the outermost ASGI middleware, which limits bodies and removes headers of untrusted
clients.

Ray Serve calls `middlewares` in its proxy, and in a replica that listens itself, if
RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it. The guard then runs before Serve reads the
headers of a request. `create_app` also adds a guard, for `serve run` without that variable. Only
the first guard of a request is active.

Serve's proxy does not know `api.cors_origins`, so a guard asks the application which CORS headers
its errors need.

The effect of headers that the guard removes or refuses in Serve 2.60 (`serve/_private/proxy.py` and
`replica.py`):

    x-request-disconnect-disabled    a request continues after its client has disconnected
    x-request-timeout-seconds        the client chooses Serve's timeout
    x-session-id, ...model_id        choose a replica
    any of them, and x-request-id    a byte that is not UTF-8 gives a 500
    x-request-id                     is logged in full, several times
"""

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.api.cors import origins_allowed_by, with_cors
from serve_app.api.early_answer import EarlyAnswer
from serve_app.api.error_response import error_response
from serve_app.api.request_id import ids_before_serve, ids_of
from serve_app.errors import LATE_BODY, InvalidRequest, RequestTooSlow, ServeError
from serve_app.protocol import header_names
from serve_app.protocol.session import SESSION_ID

if TYPE_CHECKING:
    from starlette.middleware import Middleware

log = logging.getLogger(__name__)

BODY_S = 30.0
"""Maximum seconds for any body."""
MIN_BODY_BYTES_PER_S = 50_000
"""Minimum rate of a longer body: every 50,000 bytes add a second to `BODY_S`."""
SMALL_BODY_BYTES = 8_192
"""Maximum bytes of an unread body that does not close its connection. HAProxy has received such a
body completely, so no slow client holds the connection."""
LARGE_BYTES_PER_S = 30_000_000
"""Maximum bytes per second of all bodies together, after the first `SMALL_BODY_BYTES` of each. A
higher rate would take processor time from answers."""
ARRIVED = "mixtral_serve.arrived"
"""Key of an ASGI scope: the arrival time of the request on the clock of `time.monotonic`."""
CLIENT_ID = header_names.CLIENT_ID.encode()
REMOVED = {
    b"x-request-disconnect-disabled",
    b"x-request-timeout-seconds",
    SESSION_ID.encode(),
    b"serve-multiplexed-model-id",
}
"""Headers for Serve that are removed from clients' requests, with `-` instead of `_`."""

Ids = Callable[[HTTPConnection], tuple[str, dict[str, str]]]
_PRINTABLE = re.compile(rb"[ -~]{1,%d}" % header_names.MAX_ID_CHARS)


def middlewares() -> "list[Middleware]":
    """Returns the middlewares for Serve's HTTP servers; the last one is the outermost.

    Serve calls this function when it creates an HTTP server, so it also prepares uvicorn for
    HTTP/1.0.
    """
    from starlette.middleware import Middleware

    from serve_app.api import http_1_0

    http_1_0.install()
    return [Middleware(EarlyAnswer), Middleware(Guard, ids_before_serve)]


class Guard:
    """Passes requests to `app` with their arrival time, without the headers in `REMOVED`.

    The `receive` that `app` gets does not raise: an error becomes a disconnect message.
    """

    def __init__(self, app: ASGIApp, ids: Ids = ids_of) -> None:
        """`ids` returns the id of a refused request and the response headers with its ids."""
        self._app = app
        self._ids = ids
        self._large_bodies = _LargeBodies()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or ARRIVED in scope:
            await self._app(scope, partial(_message, receive), send)
            return
        scope[ARRIVED] = time.monotonic()
        exchange = _Exchange(scope, receive, send, self._large_bodies, self._refusal)
        headers = scope["headers"]
        if any(name == CLIENT_ID and not _PRINTABLE.fullmatch(value) for name, value in headers):
            scope["headers"] = [header for header in headers if header[0] != CLIENT_ID]
            allowed = f"1 to {header_names.MAX_ID_CHARS} printable ASCII characters"
            message = f"{header_names.CLIENT_ID} must be {allowed}."
            await exchange.refuse(InvalidRequest(message))
            return
        scope["headers"] = [
            (name, value)
            for name, value in headers
            if name.replace(b"_", b"-") not in REMOVED and name.isascii()
        ]
        await self._app(scope, exchange.receive, exchange.send)

    async def _refusal(self, scope: Scope, error: ServeError) -> ASGIApp:
        """Returns the response to a refused request."""
        request_id, headers = self._ids(HTTPConnection(scope))
        response = error_response(error, request_id, scope["path"], headers)
        return with_cors(response, await origins_allowed_by(self._app, scope))


async def _message(receive: Receive) -> Message:
    """Returns the next message; a disconnect message if `receive` raises an error.

    A replica fetches the body of a request from Serve's proxy by its own calls. When a client
    disconnects, the proxy may cancel such a call before it reports the disconnect, and then Serve's
    `receive` raises Ray's TaskCancelledError (Ray 2.60, serve/_private/http_util.py).
    """
    try:
        return await receive()
    except Exception as error:
        return _disconnect(error)


def _disconnect(error: Exception) -> Message:
    log.debug(
        "The body of a request cannot be read (%s); its client has disconnected.",
        type(error).__name__,
    )
    return {"type": "http.disconnect"}


class _LargeBodies:
    """Limits the rate of all large bodies together to `LARGE_BYTES_PER_S`."""

    def __init__(self) -> None:
        self._free_at = 0.0

    async def turn(self, num_bytes: int) -> None:
        """Waits until a part of `num_bytes` may pass. The sender waits too, because its next part
        is not read.

        Example: three bodies each have a part of 3 MB at the same time. At 30 MB/s the parts pass
        after 0.1, 0.2 and 0.3 s.
        """
        now = time.monotonic()
        self._free_at = max(self._free_at, now) + num_bytes / LARGE_BYTES_PER_S
        await asyncio.sleep(self._free_at - now)


class _Exchange:
    """One request and its response."""

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        large_bodies: _LargeBodies,
        refusal: Callable[[Scope, ServeError], Awaitable[ASGIApp]],
    ) -> None:
        self._large_bodies = large_bodies
        self._refusal = refusal
        self._scope = scope
        self._receive = receive
        self._send = send
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "0")
        is_chunked = "transfer-encoding" in headers
        self._is_read = declared == "0" and not is_chunked
        is_small = declared.isdecimal() and int(declared[:20]) <= SMALL_BODY_BYTES
        self._is_small = is_small and not is_chunked
        self._num_bytes = 0
        self._is_refused = False

    async def receive(self) -> Message:
        """Returns the next message. Refuses a body that is too slow; then returns a disconnect
        message."""
        if self._is_read:
            return await _message(self._receive)
        limit_s = BODY_S + self._num_bytes / MIN_BODY_BYTES_PER_S
        timeout = asyncio.timeout(self._scope[ARRIVED] + limit_s - time.monotonic())
        try:
            async with timeout:
                message = await self._receive()
        except Exception as error:
            if not timeout.expired():
                return _disconnect(error)
            self._is_small = False  # the rest of the body may never arrive
            await self.refuse(RequestTooSlow(LATE_BODY))
            return {"type": "http.disconnect"}
        num_bytes = len(message.get("body", b""))
        if self._num_bytes > SMALL_BODY_BYTES:
            await self._large_bodies.turn(num_bytes)
        self._num_bytes += num_bytes
        self._is_read = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        """Sends a message of the response.

        A large unread body closes the connection; otherwise the HTTP server would read and drop the
        body.
        """
        if self._is_refused:
            return
        if message["type"] == "http.response.start" and not (self._is_read or self._is_small):
            message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
        await self._send(message)

    async def refuse(self, error: ServeError) -> None:
        """Sends `error` instead of the application's response."""
        response = await self._refusal(self._scope, error)
        await response(self._scope, self._receive, self.send)
        self._is_refused = True
