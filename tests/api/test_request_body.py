"""Bodies of requests: the memory that they take together."""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator

import pytest

from serve_app.api.request_body import MAX_BODY_ON_LOOP, MAX_VALUES, NUM_LARGEST, BodyReader
from serve_app.errors import InvalidRequest, QueueFull, RequestTooLarge

MAX_BYTES = 8_000_000


async def whole(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


def test_one_body_that_is_too_large_is_said_so_however_it_arrives() -> None:
    """A part larger than all bodies together may be is a 413, which no later try can mend."""
    reader = BodyReader(1000, 7)
    with pytest.raises(RequestTooLarge):
        asyncio.run(reader.read({}, whole(b" " * 1000 * (NUM_LARGEST + 1))))
    assert asyncio.run(reader.read({}, whole(b" " * 999 + b"1"))) == 1


def test_bodies_that_arrive_at_once_have_a_bound() -> None:
    """While the largest bodies fill the bound, one byte more is refused for a while; when they are
    parsed, it is taken."""
    reader = BodyReader(MAX_BYTES, 7)

    async def ask() -> None:
        ends = asyncio.Event()

        async def held() -> AsyncIterator[bytes]:
            yield b" " * MAX_BYTES
            await ends.wait()

        reading = [asyncio.create_task(reader.read({}, held())) for _ in range(NUM_LARGEST)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull) as raised:
            await reader.read({}, whole(b"1"))
        assert raised.value.retry_after_s == 7
        ends.set()
        assert await asyncio.gather(*reading) == [None] * NUM_LARGEST
        assert await reader.read({}, whole(b"[", b"1]")) == [1]

    asyncio.run(ask())


def test_a_body_that_is_refused_gives_its_bytes_back() -> None:
    """Bodies that are too large, or invalid, or whose clients leave, take nothing of the bound."""
    reader = BodyReader(MAX_BYTES, 1)

    async def leaves() -> AsyncIterator[bytes]:
        yield b" " * MAX_BYTES
        raise ConnectionError

    async def ask() -> None:
        for _ in range(NUM_LARGEST + 1):
            with pytest.raises(RequestTooLarge):
                await reader.read({}, whole(b" " * MAX_BYTES, b" "))
            with pytest.raises(InvalidRequest):
                await reader.read({}, whole(b"{" * (MAX_BODY_ON_LOOP + 1)))
            with pytest.raises(ConnectionError):
                await reader.read({}, leaves())

    asyncio.run(ask())


@pytest.mark.parametrize("packed", [False, True])
def test_a_body_of_too_many_values_is_not_parsed(packed: bool) -> None:
    """Millions of empty lists, which would take gigabytes, are refused by their number."""
    body = b"[" + b"[]," * (MAX_VALUES // 2 + 1) + b"0]"
    headers = {"content-encoding": "gzip"} if packed else {}
    reader = BodyReader(MAX_BYTES, 1)
    with pytest.raises(InvalidRequest, match="values"):
        asyncio.run(reader.read(headers, whole(gzip.compress(body, 1) if packed else body)))


def test_a_large_body_of_text_is_taken() -> None:
    """English prose and lists of token ids of the allowed size have fewer values."""
    prose = "It was the best of times, it was the worst of times, {so} they [say]. " * 100_000
    body = {"prompt": prose[:6_000_000], "ids": list(range(30_000, 200_000))}
    reader = BodyReader(MAX_BYTES, 1)
    assert asyncio.run(reader.read({}, whole(json.dumps(body).encode()))) == body
