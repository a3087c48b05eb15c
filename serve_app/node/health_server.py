"""`python -m serve_app.node.health_server SOCKET...` answers `/ping` and `/health` during a start.

RunPod's load balancer reads `/ping`: 204 means starting, 200 ready, and any other status not ready
for requests. A deployment cannot answer while its constructor loads the model. `/health` returns
the state as JSON, with status 200 if ready and 503 otherwise. Other requests are refused.

The server is a separate process, because Ray's start blocks the parent's interpreter for seconds.
Its arguments are the numbers of listening sockets. It reads fields of `State` as lines of JSON from
standard input and ends when standard input ends, so that it does not outlive its parent.

A connection may send one small request within `REQUEST_S`; others are closed.
"""

import asyncio
import json
import signal
import socket
import sys
import uuid
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus
from typing import Any, TypedDict

from serve_app.error_body import error_body, is_messages
from serve_app.errors import (
    NOT_READY,
    NOT_READY_RETRY_S,
    InvalidRequest,
    Loading,
    MethodNotAllowed,
    ServeError,
)
from serve_app.loading.phases import read_events
from serve_app.node import cors, phases
from serve_app.protocol.header_names import ANTHROPIC_ID, CLIENT_ID, MAX_ID_CHARS, OUR_ID

PING = {"loading": HTTPStatus.NO_CONTENT, "ready": HTTPStatus.OK}
"""The answer of `/ping` by status; for any other status SERVICE_UNAVAILABLE."""
REQUEST_S = 5.0
"""Maximum seconds in which a client must send its request and read the answer."""
MAX_HEAD_BYTES = 16_384

Health = Callable[[], dict[str, Any]]
"""A function that returns the body of `/health`; its field "status" decides the answer to
`/ping`."""


class HealthServer:
    """Answers on `sockets`, which already listen."""

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        health: Health,
        allowed_origins: Callable[[], Sequence[str]],
    ) -> None:
        """`allowed_origins` returns `ApiSettings.allowed_origins`."""
        self._sockets = sockets
        self._health = health
        self._allowed_origins = allowed_origins
        self._clients: set[asyncio.Task[Any]] = set()

    async def serve(self, end: Awaitable[object]) -> None:
        """Answers until `end` returns. Then it stops listening, and ends its last answers."""
        servers = [
            await asyncio.start_server(self._client, sock=listener, limit=MAX_HEAD_BYTES)
            for listener in self._sockets
        ]
        await end
        for server in servers:
            server.close()
        if self._clients:
            await asyncio.wait(self._clients)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        task.add_done_callback(self._clients.discard)
        try:
            async with asyncio.timeout(REQUEST_S):
                writer.write(self._answer(await reader.readuntil(b"\r\n\r\n")))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            writer.transport.abort()

    def _answer(self, head: bytes) -> bytes:
        """Returns the response to a request's head, both as raw bytes."""
        first, *lines = head.decode("latin-1").split("\r\n")
        fields = (line.partition(":") for line in lines if line.isprintable())
        request = {name.strip().lower(): value.strip() for name, _, value in fields}
        request_id = uuid.uuid4().hex
        method, path, body = "", "", b""
        headers = {
            OUR_ID: request_id,
            CLIENT_ID: request.get(CLIENT_ID, request_id)[:MAX_ID_CHARS],
            **cors.headers(self._allowed_origins(), request),
        }
        try:
            method, path = _first_line(first)
            if is_messages(path):
                headers[ANTHROPIC_ID] = request_id
            status, content = self._reply(method, path, cors.ALLOWED in headers)
        except ServeError as error:
            status, content = HTTPStatus(error.http_status), error_body(error, request_id, path)
            headers |= error.headers
        if status is HTTPStatus.SERVICE_UNAVAILABLE:
            headers["Retry-After"] = str(NOT_READY_RETRY_S)
        if content is not None:
            body = json.dumps(content).encode()
            headers |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
        named = [f"{name}: {value}" for name, value in headers.items()]
        answer = [f"HTTP/1.1 {status.value} {status.phrase}", "Connection: close", *named, "", ""]
        return "\r\n".join(answer).encode("latin-1") + (b"" if method == "HEAD" else body)

    def _reply(self, method: str, path: str, may_ask: bool) -> tuple[HTTPStatus, Any]:
        """Returns the status and the JSON body, which may be None. Raises `ServeError`."""
        if method == "OPTIONS" and may_ask:
            return HTTPStatus.NO_CONTENT, None
        if path not in ("/ping", "/health"):
            raise Loading(NOT_READY)
        if method not in ("GET", "HEAD"):
            raise MethodNotAllowed(f"{path} takes GET.", allow="GET, HEAD")
        health = self._health()
        ping = PING.get(health["status"], HTTPStatus.SERVICE_UNAVAILABLE)
        if path == "/ping":
            is_empty = ping is HTTPStatus.NO_CONTENT
            return ping, None if is_empty else {"status": health["status"]}
        is_ready = ping is HTTPStatus.OK
        return HTTPStatus.OK if is_ready else HTTPStatus.SERVICE_UNAVAILABLE, health


def _first_line(line: str) -> tuple[str, str]:
    """Returns the method and the path of a request. Raises `InvalidRequest`."""
    match line.split(" "):
        case [method, target, version] if version.startswith("HTTP/1."):
            return method, target.partition("?")[0]
    raise InvalidRequest("The request is not HTTP/1.1.")


class State(TypedDict):
    """The state that the parent sends."""

    status: str
    """"loading", "ready", "draining" or "failed"."""
    load_log: str | None
    allowed_origins: list[str]
    """The setting; empty before the settings are known."""


def health(state: State) -> dict[str, Any]:
    """Returns `{"status", "load": [...]}` and the current phase, as waiting jobs get them."""
    events = read_events(state["load_log"]) if state["load_log"] else []
    return {"status": state["status"], **phases.summary(events)}


async def follow_parent(state: State) -> None:
    """Updates `state` with each line of standard input, until its end."""
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, sys.stdin)
    async for line in reader:
        state.update(json.loads(line))


def main(numbers: Sequence[str]) -> None:
    """Answers on the inherited sockets with these numbers."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # the parent says when to end
    state = State(status="loading", load_log=None, allowed_origins=[])
    server = HealthServer(
        [socket.socket(fileno=int(number)) for number in numbers],
        lambda: health(state),
        lambda: state["allowed_origins"],
    )
    asyncio.run(server.serve(follow_parent(state)))


if __name__ == "__main__":
    main(sys.argv[1:])
