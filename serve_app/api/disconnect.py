"""Disconnect: ASGI middleware that converts a connection error to a disconnect message."""

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger(__name__)


class Disconnect:
    """Passes requests to `app` with a `receive` that does not raise.

    A replica fetches the body of a request from Serve's proxy by its own calls. When a client
    disconnects, the proxy may cancel such a call before it reports the disconnect, and then Serve's
    `receive` raises Ray's TaskCancelledError (Ray 2.60, serve/_private/http_util.py).
    """

    def __init__(self, app: "ASGIApp") -> None:
        self._app = app

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        async def receive_or_left() -> "Message":
            try:
                return await receive()
            except Exception as error:
                log.debug(
                    "The body of a request cannot be read (%s); its client has disconnected.",
                    type(error).__name__,
                )
                return {"type": "http.disconnect"}

        await self._app(scope, receive_or_left, send)
