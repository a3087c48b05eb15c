"""Answers `/ping` and `/health` on PORT_HEALTH from the first moment, in a thread of its own.

RunPod's load balancer reads `/ping`: 204 means starting, 200 ready, and any other status that the
server takes no requests. A deployment answers nothing while its constructor loads the model.
`/health` gives the state as JSON, with status 200 when ready and 503 otherwise.

A connection carries one small request within `REQUEST_S`; others are closed.
"""

import asyncio
import json
import threading
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from serve_app.machine.ports import listen

PING = {"loading": HTTPStatus.NO_CONTENT, "ready": HTTPStatus.OK}
"""The answer of `/ping` by status; for any other status SERVICE_UNAVAILABLE."""
REQUEST_S = 5.0
"""Seconds that a client has to send its request and read the answer."""
MAX_HEAD_BYTES = 16_384

Health = Callable[[], dict[str, Any]]
"""Returns the body of `/health`, whose "status" decides the answer of `/ping`."""


class HealthListener:
    """Listens on 0.0.0.0:`port` from its construction until the process ends."""

    def __init__(self, port: int, health: Health) -> None:
        """Raises `ConfigError` if the port is in use."""
        # Not in the thread, so that the caller gets the error.
        self._socket = listen("PORT_HEALTH", port)
        self._health = health
        # A daemon, so that slow clients do not delay the end of the process.
        threading.Thread(target=self._run, name="health", daemon=True).start()

    @property
    def port(self) -> int:
        return int(self._socket.getsockname()[1])

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._client, sock=self._socket, limit=MAX_HEAD_BYTES)
        await server.serve_forever()

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(REQUEST_S):
                writer.write(self._answer(await reader.readuntil(b"\r\n\r\n")))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            writer.transport.abort()

    def _answer(self, head: bytes) -> bytes:
        """The response to a request's head, bytes as they go over the wire."""
        method, status = b"", HTTPStatus.BAD_REQUEST
        body: dict[str, Any] = {}
        match head.partition(b"\r\n")[0].split(b" "):
            case [method, target, version] if version.startswith(b"HTTP/1."):
                status = HTTPStatus.METHOD_NOT_ALLOWED
                if method in (b"GET", b"HEAD"):
                    status, body = self._route(target.partition(b"?")[0])
        lines = [f"HTTP/1.1 {status.value} {status.phrase}", "Connection: close"]
        content = b""
        if status is not HTTPStatus.NO_CONTENT:
            content = json.dumps(body).encode()
            lines += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
        response = "\r\n".join([*lines, "", ""]).encode()
        return response if method == b"HEAD" else response + content

    def _route(self, path: bytes) -> tuple[HTTPStatus, dict[str, Any]]:
        if path not in (b"/ping", b"/health"):
            return HTTPStatus.NOT_FOUND, {}
        health = self._health()
        ping = PING.get(health["status"], HTTPStatus.SERVICE_UNAVAILABLE)
        if path == b"/ping":
            return ping, {"status": health["status"]}
        is_ready = ping is HTTPStatus.OK
        return HTTPStatus.OK if is_ready else HTTPStatus.SERVICE_UNAVAILABLE, health
