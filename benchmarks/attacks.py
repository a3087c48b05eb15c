"""Rude clients: each function attacks the server at `port` until it is cancelled.

python -m benchmarks.attacks NAME PORT
"""

import asyncio
import contextlib
import json
import sys
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from benchmarks.http_client import Connection
from benchmarks.polite_clients import KEY

Attack = Callable[[int], Coroutine[Any, Any, None]]


async def half_bodies(port: int) -> None:
    """Sends 360 requests whose bodies never end."""
    head = _head("POST", "/v1/completions", 1000) + b'{"prompt": '
    await _many(360, lambda: _send_and_wait(port, head))


async def half_pings(port: int) -> None:
    """Sends 360 incomplete bodies to a status route."""
    await _many(360, lambda: _send_and_wait(port, _head("POST", "/ping", 1000) + b"{"))


async def endless_headers(port: int) -> None:
    """Opens 4 connections that send headers for as long as they may."""

    async def one() -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(b"GET /ping HTTP/1.1\r\nHost: a\r\n")
            for number in range(10**9):
                writer.write(b"x-%d: %s\r\n" % (number, b"a" * 1000))
                await writer.drain()
        finally:
            writer.close()

    await _many(4, one)


async def slow_readers(port: int) -> None:
    """Opens 50 streams and reads nothing."""
    body = {"prompt": "a", "max_tokens": 4000, "stream": True, "ignore_eos": True}
    text = json.dumps(body).encode()
    data = _head("POST", "/v1/completions", len(text)) + text
    await _many(50, lambda: _send_and_wait(port, data))


async def invalid_bodies(port: int) -> None:
    """Runs 20 clients that send invalid bodies of 8 MB; half of the bodies are only brackets."""
    shapes = [b"[" + b"[]," * 2_600_000 + b"1]", b'{"a":' + b'{"b":1},' * 980_000 + b"}"]
    datas = [_head("POST", "/v1/completions", len(body)) + body for body in shapes]
    await _many(10, lambda: _ask_raw(port, datas[0]), lambda: _ask_raw(port, datas[1]))


async def logprob_bombs(port: int) -> None:
    """Runs 5 clients that ask for all log probabilities of 256 prompts."""
    body = {"prompt": ["a"] * 256, "max_tokens": 100, "logprobs": 20, "ignore_eos": True}
    small = body | {"max_tokens": 16}
    await _many(3, lambda: _ask(port, body), lambda: _ask(port, small))


async def list_bombs(port: int) -> None:
    """Runs 10 clients that send lists of 1,000 prompts."""
    body = {"prompts": ["Say it."] * 1000, "max_tokens": 32, "ignore_eos": True}
    await _many(10, lambda: _ask(port, body, "/prompt"))


ATTACKS: dict[str, Attack] = {
    attack.__name__: attack
    for attack in (
        half_bodies,
        half_pings,
        endless_headers,
        slow_readers,
        invalid_bodies,
        logprob_bombs,
        list_bombs,
    )
}


def _head(method: str, path: str, length: int) -> bytes:
    return (
        f"{method} {path} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


async def _many(number: int, *ones: Callable[[], Awaitable[None]]) -> None:
    """Runs `number` clients of each kind; a client begins again when its connection ends."""

    async def again(one: Callable[[], Awaitable[None]]) -> None:
        while True:
            with contextlib.suppress(OSError, EOFError, ValueError):
                await one()
            await asyncio.sleep(0.2)

    await asyncio.gather(*(again(one) for one in ones for _ in range(number)))


async def _send_and_wait(port: int, data: bytes) -> None:
    """Sends `data`, reads nothing, and waits until the server closes or for two minutes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
    try:
        writer.write(data)
        async with asyncio.timeout(120):
            while not reader.at_eof() and not writer.is_closing():  # noqa: ASYNC110
                await asyncio.sleep(0.5)
    except TimeoutError:
        return
    finally:
        writer.transport.abort()


async def _ask_raw(port: int, data: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        await writer.drain()
        await reader.readuntil(b"\r\n\r\n")
    finally:
        writer.transport.abort()


async def _ask(port: int, body: Any, path: str = "/v1/completions") -> None:
    connection = Connection("127.0.0.1", port, KEY)
    try:
        response = await connection.request("POST", path, body)
        if response.status == 429:
            await asyncio.sleep(int(response.headers.get(b"retry-after", b"1")))
    finally:
        connection.close()


if __name__ == "__main__":
    asyncio.run(ATTACKS[sys.argv[1]](int(sys.argv[2])))
