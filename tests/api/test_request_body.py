"""Bodies of requests: the memory that they take together."""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings, strategies

from serve_app.api import request_body
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
    """While the largest bodies fill the bound, another large one is refused for a while and a small
    one is taken; when they are parsed, a large one is taken."""
    reader = BodyReader(MAX_BYTES, 7)
    large = b"[%s1]" % (b" " * MAX_BODY_ON_LOOP)

    async def ask() -> None:
        ends = asyncio.Event()

        async def held() -> AsyncIterator[bytes]:
            yield b" " * MAX_BYTES
            await ends.wait()

        reading = [asyncio.create_task(reader.read({}, held())) for _ in range(NUM_LARGEST)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull) as raised:
            await reader.read({}, whole(large))
        assert raised.value.retry_after_s == 7
        assert await reader.read({}, whole(b"[", b"1]")) == [1]
        ends.set()
        assert await asyncio.gather(*reading) == [None] * NUM_LARGEST
        assert await reader.read({}, whole(large)) == [1]

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


class Clock:
    """Time that passes in `sleep` and `work` alone."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.sleeps: list[float] = []

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.sleeps.append(round(seconds, 6))
        self.now += seconds


@pytest.mark.parametrize("seconds", [0.01, 0.1, 10.0])
def test_large_bodies_are_parsed_one_by_one_with_pauses(
    monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """They take a quarter of the time at most, and the next one waits a second at most."""
    clock = Clock()
    reader = BodyReader(MAX_BYTES, 1)
    monkeypatch.setattr(request_body, "time", clock)
    fake = SimpleNamespace(sleep=clock.sleep, to_thread=asyncio.to_thread)
    monkeypatch.setattr(request_body, "asyncio", fake)

    def parse(*_: object) -> None:
        clock.now += seconds

    monkeypatch.setattr(request_body, "_value", parse)

    async def ask() -> None:
        large = b" " * (MAX_BODY_ON_LOOP + 1)
        await asyncio.gather(*(reader.read({}, whole(large)) for _ in range(3)))
        await reader.read({}, whole(b" " * MAX_BODY_ON_LOOP))

    asyncio.run(ask())
    assert clock.sleeps == pytest.approx([0.0, *[min(3 * seconds, 1.0)] * 2])


def many(number: int, item: bytes) -> bytes:
    return b"[" + b",".join([item] * number) + b"]"


@pytest.mark.parametrize(
    ("cost", "item"),
    [
        (1, b"1.5"),
        (1, b'"ab"'),
        (4, b"[]"),
        (4, b"{}"),
        (18, b'{"b":1}'),
        (1, rb'"\\\",:[{\\"'),
    ],
)
def test_each_value_counts_by_what_it_costs(cost: int, item: bytes) -> None:
    """As many as are allowed are taken, and a few more are refused; text in strings is free."""
    reader = BodyReader(3 * MAX_BYTES, 1)
    number = (MAX_VALUES - 3) // cost
    assert len(asyncio.run(reader.read({}, whole(many(number, item))))) == number
    with pytest.raises(InvalidRequest, match="values"):
        asyncio.run(reader.read({}, whole(many(number + 5, item))))


JSON = strategies.recursive(
    strategies.none() | strategies.integers() | strategies.text('\\",:[{}] aé\n'),
    lambda items: strategies.lists(items) | strategies.dictionaries(strategies.text(), items),
)


def cost_of(value: Any) -> int:
    """Returns the cost by the parsed value."""
    match value:
        case list():
            return 3 + max(len(value) - 1, 0) + sum(map(cost_of, value))
        case dict():
            return 3 + max(len(value) - 1, 0) + 14 * len(value) + sum(map(cost_of, value.values()))
    return 0


@settings(max_examples=50)
@given(JSON, strategies.integers(1, 40), strategies.booleans())
def test_strings_are_left_out_of_the_cost(value: Any, size: int, ascii: bool) -> None:
    """In slices of any size, the cost of a text is that of its values."""
    text = json.dumps(value, ensure_ascii=ascii).encode("utf-8", "surrogatepass")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(request_body, "SLICE_BYTES", size)
        assert request_body._cost_without_strings(text) == cost_of(value)


@given(strategies.binary())
def test_the_cost_of_any_bytes_is_found(body: bytes) -> None:
    """The search ends for what is no JSON, with at most what a search in strings too would find."""
    assert request_body._cost_without_strings(body) <= request_body._cost(body)


@pytest.mark.parametrize("packed", [False, True])
def test_a_body_of_too_many_values_is_not_parsed(packed: bool) -> None:
    """Millions of empty lists, which would take gigabytes, are refused by their number."""
    body = b"[" + b"[]," * (MAX_VALUES // 2 + 1) + b"0]"
    headers = {"content-encoding": "gzip"} if packed else {}
    reader = BodyReader(MAX_BYTES, 1)
    with pytest.raises(InvalidRequest, match="values"):
        asyncio.run(reader.read(headers, whole(gzip.compress(body, 1) if packed else body)))


def test_a_large_body_of_text_is_taken() -> None:
    """Prose, code and lists of token ids of the allowed size have fewer values."""
    code = (
        'it["was"]: {"the": [best, "of times"]}, it.was(the, {"worst": ["of", "times"]})\n' * 70_000
    )
    body = {"prompt": code[:5_000_000], "ids": list(range(30_000, 200_000))}
    reader = BodyReader(MAX_BYTES, 1)
    assert asyncio.run(reader.read({}, whole(json.dumps(body).encode()))) == body
