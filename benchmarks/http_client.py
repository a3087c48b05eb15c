"""A small HTTP/1.1 client on asyncio streams, for thousands of clients in one process.

It costs a third of aiohttp's processor time, which the load generator takes from the server on the
same machine. It reads answers with a length, in chunks, or up to the end of the connection.
"""

import asyncio
import json
from typing import Any, NamedTuple


class Response(NamedTuple):
    """One answer, whole."""

    status: int
    headers: dict[bytes, bytes]
    """Names in lower case."""
    body: bytes


class Connection:
    """One client's connection, which is reopened if the server has closed it."""

    def __init__(self, host: str, port: int, key: str | None) -> None:
        self._host, self._port = host, port
        self._key = "" if key is None else f"Authorization: Bearer {key}\r\n"
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def request(self, method: str, path: str, body: Any = None) -> Response:
        """Sends one request. Raises `OSError` or `EOFError` if no whole answer comes."""
        text = b"" if body is None else json.dumps(body).encode()
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: {self._host}\r\n{self._key}"
            f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
        )
        is_new = self._streams is None
        try:
            return await self._exchange(head.encode() + text)
        except (OSError, EOFError):
            self.close()
            if is_new:
                raise
        # A server may close a connection that is idle, just as the next request is sent.
        return await self._exchange(head.encode() + text)

    async def _exchange(self, data: bytes) -> Response:
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._host, self._port, limit=1 << 26)
        reader, writer = self._streams
        try:
            writer.write(data)
            lines = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
            pairs = (line.partition(b":") for line in lines[1:] if line)
            headers = {name.lower(): value.strip() for name, _, value in pairs}
            body = await _body(reader, headers)
        except BaseException:
            self.close()
            raise
        if headers.get(b"connection", b"").lower() == b"close":
            self.close()
        return Response(int(lines[0].split()[1]), headers, body)

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def _body(reader: asyncio.StreamReader, headers: dict[bytes, bytes]) -> bytes:
    if (length := headers.get(b"content-length")) is not None:
        return await reader.readexactly(int(length))
    if headers.get(b"transfer-encoding", b"").lower() != b"chunked":
        return await reader.read()
    parts = []
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        parts.append((await reader.readexactly(size + 2))[:-2])
    await reader.readuntil(b"\r\n")
    return b"".join(parts)
