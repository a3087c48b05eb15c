"""What the engine's thread tells reaches each consumer whole, in order, and without crowding it."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.engine.delta import Delta, FinishReason
from serve_app.engine.output_queue import DELIVERY_SHARE, MAX_PAUSE_S, OutputQueue
from serve_app.engine.stream import Stream
from serve_app.errors import DeadlinePassed


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def token(token_id: int, reason: FinishReason | None = None) -> Delta:
    return Delta([token_id], [], reason)


async def worked_off() -> None:
    """Until the loop has done all that it was told."""
    for _ in range(5):
        await asyncio.sleep(0)


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


async def begun(outbox: OutputQueue, count: int) -> list[Stream]:
    """Streams that have read their first delta."""
    streams = [Stream(asyncio.get_running_loop()) for _ in range(count)]
    for stream in streams:
        outbox.add(stream, token(0))
    outbox.flush()
    for stream in streams:
        assert (await stream.next()).token_ids == [0]
    await worked_off()
    return streams


@pytest.mark.parametrize(
    ("took", "due"),
    [(0.01, 0.01 / DELIVERY_SHARE), (60.0, 60.0 + MAX_PAUSE_S)],
    ids=["busy", "held up"],
)
def test_a_loop_that_is_busy_with_a_delivery_gets_the_rest_merged(took: float, due: float) -> None:
    """While one delivery is under way, and for as long as its share asks, deltas are merged; what
    held a loop up for a minute holds no stream back much longer."""

    async def scenario() -> None:
        clock = Clock()
        outbox = OutputQueue(clock)
        (stream,) = await begun(outbox, 1)
        outbox.add(stream, token(1))
        outbox.flush()  # under way
        clock.now = took
        for token_id in (2, 3):
            outbox.add(stream, token(token_id))
            outbox.flush()
        assert (await stream.next()).token_ids == [1]
        await worked_off()  # it took that long
        clock.now = due - 0.001
        outbox.flush()
        reader = asyncio.create_task(stream.next())
        await worked_off()
        assert not reader.done()
        clock.now = due
        outbox.flush()
        assert (await reader).token_ids == [2, 3]

    run(scenario())


def test_first_and_last_deltas_never_wait() -> None:
    """A new stream hears its first token, an ending one its last, though a delivery is under way;
    what was held back for the ending one comes with its end."""

    async def scenario() -> None:
        outbox = OutputQueue(Clock())
        held, busy = await begun(outbox, 2)
        outbox.add(busy, token(1))
        outbox.flush()  # under way until the loop has its turn
        outbox.add(held, token(1))
        outbox.flush()
        newcomer = Stream(asyncio.get_running_loop())
        outbox.add(newcomer, token(7))
        outbox.add(held, token(2, "length"))
        outbox.flush()
        assert (await newcomer.next()).token_ids == [7]
        assert await held.next() == Delta([1, 2], [], "length")

    run(scenario())


def test_a_loop_that_closes_with_a_delivery_under_way_is_told_of() -> None:
    """The engine learns of it at the next flush, and does not wait for it."""
    outbox = OutputQueue(Clock())
    loop = asyncio.new_event_loop()
    stream = Stream(loop)
    for token_id in range(2):  # the second is no first delta
        outbox.add(stream, token(token_id))
        assert outbox.flush() == set()
    loop.close()
    outbox.add(stream, token(2))
    assert outbox.flush() == {loop}
    assert outbox.flush() == set()


def test_a_deadline_is_heard_though_tokens_come_after_it() -> None:
    """By a consumer that fetches late; and an answer that was whole before it stays whole."""

    async def scenario() -> None:
        late, whole = (Stream(asyncio.get_running_loop()) for _ in range(2))
        late.put(token(1))
        late.expire()
        late.put(token(2))
        delta = await late.next()
        assert (delta.token_ids, type(delta.error)) == ([1], DeadlinePassed)
        whole.put(token(1, "stop"))
        whole.expire()
        assert await whole.next() == token(1, "stop")

    run(scenario())


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(0, 2)),
            st.tuples(st.just("flush"), st.just(0)),
            st.tuples(st.just("loop"), st.integers(1, 3)),
            st.tuples(st.just("pass"), st.integers(0, 5)),
        ),
        max_size=60,
    )
)
def test_every_token_arrives_once_and_in_order(happenings: list[tuple[str, int]]) -> None:
    """Whatever the order of steps, deliveries, readers and time."""

    async def scenario() -> None:
        clock = Clock()
        outbox = OutputQueue(clock)
        streams = [Stream(asyncio.get_running_loop()) for _ in range(3)]
        sent: list[list[int]] = [[] for _ in streams]
        readers = [asyncio.create_task(read_all(stream)) for stream in streams]
        for what, number in happenings:
            if what == "add":
                outbox.add(streams[number], token(len(sent[number])))
                sent[number].append(len(sent[number]))
            elif what == "flush":
                outbox.flush()
            elif what == "loop":
                for _ in range(number):
                    await asyncio.sleep(0)
            else:
                clock.now += number
        for stream in streams:
            outbox.add(stream, Delta([], [], "stop"))
        outbox.flush()
        assert await asyncio.gather(*readers) == sent

    run(scenario())


async def read_all(stream: Stream) -> list[int]:
    found: list[int] = []
    while True:
        delta = await stream.next()
        found += delta.token_ids
        if delta.finish_reason is not None:
            return found
