"""Responses for HTTP/1.0 clients, which cannot read chunked encoding.

uvicorn 0.54 sends each response of unknown length in chunks. RFC 9112 (6.1) forbids this for an
HTTP/1.0 client. Here the end of the connection ends such a response, and its status line has
version 1.0, because HAProxy would chunk a response of version 1.1. Ray Serve creates uvicorn's
server and has no option for its protocol class, so `install` replaces the class.
"""

from typing import TYPE_CHECKING, cast

from uvicorn.protocols.http import httptools_impl

if TYPE_CHECKING:
    import asyncio

    from uvicorn._types import ASGISendEvent

NO_BODY = (204, 304)


class _Head:
    """Collects the bytes that uvicorn writes, in place of a transport."""

    def __init__(self) -> None:
        self.written = b""

    def write(self, data: bytes) -> None:
        self.written += data


class Cycle(httptools_impl.RequestResponseCycle):
    """A request and its response: uvicorn's class for HTTP/1.1, changed for HTTP/1.0."""

    _ends_with_connection = False

    async def send(self, message: "ASGISendEvent") -> None:
        """Sends a message of the application."""
        if self.scope["http_version"] != "1.0":
            await super().send(message)
        elif message["type"] == "http.response.start":
            names = {name.lower() for name, _ in message.get("headers", ())}
            if b"content-length" not in names and message["status"] not in NO_BODY:
                self._ends_with_connection = True
                self.chunked_encoding = False
            transport, head = self.transport, _Head()
            self.transport = cast("asyncio.Transport", head)
            try:
                await super().send(message)
            finally:
                self.transport = transport
            transport.write(head.written.replace(b"HTTP/1.1", b"HTTP/1.0", 1))
        elif message["type"] == "http.response.body":
            if self._ends_with_connection:
                # uvicorn compares the body with the length, which is known only at the end.
                self.expected_content_length = len(message.get("body", b""))
            await super().send(message)


def install() -> None:
    """Makes uvicorn use `Cycle` for the connections that this process accepts."""
    httptools_impl.RequestResponseCycle = Cycle  # type: ignore[misc]
