"""MixtralServer: the deployment class, as a plain object.

A deployment handle calls `call`, which returns the answer as data. The HTTP ingress calls
`require_room` and the handlers of routes itself, because it reads the body between the two.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from serve_app.api import routes
from serve_app.api.route import Route
from serve_app.api.served_model import ServedModel
from serve_app.error_body import error_body
from serve_app.errors import Draining
from serve_app.protocol.call import (
    BatchReply,
    Call,
    JsonReply,
    Reply,
    ReplyItem,
    StreamReply,
    TextReply,
)
from serve_app.protocol.key_account import KeyAccount


class MixtralServer(ServedModel):
    """One loaded model and the answers to all routes."""

    async def answer(self, call: Call) -> Reply:
        """Answers one call, whose body must be complete.

        May raise any exception; `failure` converts it to the client's error.
        """
        self.loop_lag.start()
        route = routes.match(call.method, call.path)
        self.require_room(route, call.account)
        return await route.handler(self, call)

    def require_room(self, route: Route, account: KeyAccount | None = None) -> None:
        """Raises `EngineDead`, `Draining` or `QueueFull` if a request of this route cannot be
        accepted now. Thread-safe."""
        if self.is_draining and route.method == "POST":
            raise Draining(
                "The server is shutting down; send the request to another one.",
                retry_after_s=self.settings.api.retry_after_s,
            )
        if route.generates:
            self._engine.require_room(account.group if account is not None else "")
        else:
            self.check_health()

    async def call(
        self, method: str, path: str, body: Any, request_id: str, traceparent: str | None = None
    ) -> AsyncGenerator[ReplyItem, None]:
        """Answers one call of a deployment handle. Replies and errors are data: see `ReplyItem`.

        Closing the generator cancels the request.
        """
        try:
            call = Call(method, path, body, request_id, traceparent=traceparent)
            match await self.answer(call):
                case JsonReply(body, status):
                    yield {"status": status, "body": body}
                case TextReply(text):
                    yield {"status": 200, "body": text}
                case BatchReply(items):
                    async with aclosing(items):
                        async for item in items:
                            yield item
                case StreamReply(chunks):
                    async with aclosing(chunks):
                        async for chunk in chunks:
                            yield {"chunk": chunk}
        except Exception as raised:
            error = self.failure(raised, request_id)
            yield {"status": error.http_status, "error": error_body(error, request_id, path)}
