"""Deltas reach each consumer whole and in order, and leave its event loop time for other work."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.engine.delta import Delta, FinishReason
from serve_app.engine.output_queue import MAX_PAUSE_S, OutputQueue
from serve_app.engine.stream import Stream
from serve_app.errors import DeadlinePassed


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def token(token_id: int, reason: FinishReason | None = None) -> Delta:
    return Delta([token_id], [], reason)


async def run_callbacks() -> None:
    """Lets the event loop run everything that is scheduled."""
    for _ in range(5):
        await asyncio.sleep(0)


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


async def start_streams(outputs: OutputQueue, count: int) -> list[Stream]:
    """Streams that have read their first delta."""
    streams = [Stream(asyncio.get_running_loop()) for _ in range(count)]
    for stream in streams:
        outputs.add(stream, token(0))
    outputs.flush()
    for stream in streams:
        assert (await stream.next()).token_ids == [0]
    await run_callbacks()
    return streams


@pytest.mark.parametrize(
    ("took", "due"),
    [(0.01, 0.08), (60.0, 60.0 + MAX_PAUSE_S)],
    ids=["busy", "held up"],
)
def test_a_busy_loop_gets_merged_deltas(took: float, due: float) -> None:
    """Deltas are merged during a delivery and the pause after it, which has a limit."""

    async def scenario() -> None:
        clock = Clock()
        outputs = OutputQueue(clock)
        (stream,) = await start_streams(outputs, 1)
        outputs.add(stream, token(1))
        outputs.flush()  # in progress
        clock.now = took
        for token_id in (2, 3):
            outputs.add(stream, token(token_id))
            outputs.flush()
        assert (await stream.next()).token_ids == [1]
        await run_callbacks()  # it took that long
        clock.now = due - 0.001
        outputs.flush()
        reader = asyncio.create_task(stream.next())
        await run_callbacks()
        assert not reader.done()
        clock.now = due
        outputs.flush()
        assert (await reader).token_ids == [2, 3]

    run(scenario())


def test_first_and_last_deltas_never_wait() -> None:
    """First and last deltas are sent during a delivery; a held delta comes with the last one."""

    async def scenario() -> None:
        outputs = OutputQueue(Clock())
        held, busy = await start_streams(outputs, 2)
        outputs.add(busy, token(1))
        outputs.flush()  # in progress until the loop runs its callbacks
        outputs.add(held, token(1))
        outputs.flush()
        newcomer = Stream(asyncio.get_running_loop())
        outputs.add(newcomer, token(7))
        outputs.add(held, token(2, "length"))
        outputs.flush()
        assert (await newcomer.next()).token_ids == [7]
        assert await held.next() == Delta([1, 2], [], "length")

    run(scenario())


def test_a_pause_of_the_engine_holds_nothing_back() -> None:
    """Before a long step, deltas are sent while the loop is still busy, whole and in order."""

    async def scenario() -> None:
        outputs = OutputQueue(Clock())
        (stream,) = await start_streams(outputs, 1)
        for token_id in (1, 2):
            outputs.add(stream, token(token_id))
            outputs.flush()  # the first one is in progress, and the second one is held
        outputs.flush(is_pausing=True)
        await run_callbacks()
        assert (await stream.next()).token_ids == [1, 2]

    run(scenario())


def test_flush_returns_a_loop_that_closed_during_a_delivery() -> None:
    """The next flush returns the closed loop instead of waiting for its delivery."""
    outputs = OutputQueue(Clock())
    loop = asyncio.new_event_loop()
    stream = Stream(loop)
    for token_id in range(2):  # the second is no first delta
        outputs.add(stream, token(token_id))
        assert outputs.flush() == set()
    loop.close()
    outputs.add(stream, token(2))
    assert outputs.flush() == {loop}
    assert outputs.flush() == set()


def test_a_deadline_ends_a_stream_that_gets_more_tokens() -> None:
    """A late reader gets the deadline's error; an answer that was complete stays complete."""

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
            st.tuples(st.sampled_from(["flush", "flush all"]), st.just(0)),
            st.tuples(st.just("loop"), st.integers(1, 3)),
            st.tuples(st.just("pass"), st.integers(0, 5)),
        ),
        max_size=60,
    )
)
def test_every_token_arrives_once_and_in_order(happenings: list[tuple[str, int]]) -> None:
    """For any order of steps, deliveries, reads and clock times, no token is lost or doubled."""

    async def scenario() -> None:
        clock = Clock()
        outputs = OutputQueue(clock)
        streams = [Stream(asyncio.get_running_loop()) for _ in range(3)]
        sent: list[list[int]] = [[] for _ in streams]
        readers = [asyncio.create_task(read_all(stream)) for stream in streams]
        for what, number in happenings:
            if what == "add":
                outputs.add(streams[number], token(len(sent[number])))
                sent[number].append(len(sent[number]))
            elif what.startswith("flush"):
                outputs.flush(is_pausing=what == "flush all")
            elif what == "loop":
                for _ in range(number):
                    await asyncio.sleep(0)
            else:
                clock.now += number
        for stream in streams:
            outputs.add(stream, Delta([], [], "stop"))
        outputs.flush()
        assert await asyncio.gather(*readers) == sent

    run(scenario())


async def read_all(stream: Stream) -> list[int]:
    found: list[int] = []
    while True:
        delta = await stream.next()
        found += delta.token_ids
        if delta.finish_reason is not None:
            return found
