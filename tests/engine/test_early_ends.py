"""Requests that end early: a consumer leaves, a deadline passes, the engine stops.

In each case the KV blocks are freed and the other requests go on.
"""

import asyncio

import pytest

from serve_app.engine.delta import Delta
from serve_app.engine.stream import Stream
from serve_app.errors import DeadlinePassed, Draining
from tests.engine.fake import (
    FakeRunner,
    complete,
    greedy,
    repeat,
    run,
    running,
    settled,
    start,
)


@pytest.mark.parametrize("how", ["close", "cancel"])
def test_leaving_frees_the_blocks_at_the_next_step(how: str) -> None:
    """After the generator is closed or its task cancelled, the next step has no such sequence."""
    runner = FakeRunner(is_held=True)

    async def leave() -> None:
        request, _ = await start(engine, runner, greedy(50, ignore_eos=True))
        if how == "close":
            await request.aclose()
        else:
            task = asyncio.ensure_future(anext(request))
            await asyncio.sleep(0)  # now it waits for its next delta
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        runner.let_go()
        await settled(engine)
        stats = engine.stats()
        assert (stats.num_running, stats.num_waiting, stats.num_used_blocks) == (0, 0, 0)
        # Its first step, the one that was in flight, and the other request's.
        assert len(runner.steps) == 3

    with running(runner) as engine:
        run(leave())


@pytest.mark.parametrize("wait_s", [0.0, 0.05])
def test_a_deadline_ends_a_request_and_frees_its_blocks(wait_s: float) -> None:
    """A deadline in the past, or during a long step, raises DeadlinePassed at once."""
    runner = FakeRunner(is_held=True)

    async def late() -> None:
        deadline = asyncio.get_running_loop().time() + wait_s
        with pytest.raises(DeadlinePassed):
            await anext(engine.generate([1, 2], greedy(50, ignore_eos=True), deadline))
        runner.let_go()
        await settled(engine)
        stats = engine.stats()
        assert (stats.num_running, stats.num_waiting, stats.num_used_blocks) == (0, 0, 0)

    with running(runner) as engine:
        run(late())


def test_tokens_before_a_deadline_are_delivered() -> None:
    """Tokens that the consumer has not read when the deadline passes come with the error."""

    async def late() -> Delta:
        stream = Stream(asyncio.get_running_loop())
        stream.put(Delta([8], []))
        stream.expire()
        return await stream.next()

    delta = run(late())
    assert delta.token_ids == [8]
    assert isinstance(delta.error, DeadlinePassed)


def test_first_tokens_with_an_error_have_their_queue_time() -> None:
    """First tokens that come with an error are yielded with `queued_s`; then it is raised."""
    runner = FakeRunner(is_held=True)
    runner.allow(2)

    async def late() -> None:
        deadline = asyncio.get_running_loop().time() + 0.01
        request = engine.generate([1, 2], greedy(50, ignore_eos=True), deadline)
        first = asyncio.ensure_future(anext(request))
        await asyncio.sleep(0)
        # The event loop is blocked, and then gets both at once: once there is a second token, the
        # first one has been sent.
        while (
            asyncio.get_running_loop().time() <= deadline
            or engine.stats().num_generation_tokens < 2
        ):
            pass
        delta = await first
        assert delta.token_ids
        assert (delta.finish_reason, delta.error) == (None, None)
        assert (delta.queued_s or 0) > 0
        with pytest.raises(DeadlinePassed):
            await anext(request)

    with running(runner) as engine:
        run(late())


def test_leaving_the_queue_costs_no_step() -> None:
    """A request that is cancelled while it waits never runs."""
    runner = FakeRunner(is_held=True)

    async def leave() -> None:
        first, _ = await start(engine, runner, greedy(20, ignore_eos=True))
        waiting = asyncio.ensure_future(complete(engine, [42], greedy(5)))
        await asyncio.sleep(0)
        assert engine.stats().num_waiting == 1
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        runner.let_go()
        async for _ in first:
            pass
        await settled(engine)

    with running(runner, max_num_seqs=1) as engine:
        run(leave())
        assert all(chunk.sequence.token_ids[0] != 42 for step in runner.steps for chunk in step)
        assert engine.stats().num_waiting == 0


def test_a_request_of_a_closed_event_loop_is_dropped() -> None:
    """Blocks are freed when the consumer's loop closes with its generator open; others go on."""
    runner = FakeRunner(is_held=True)
    with running(runner) as engine:
        loop = asyncio.new_event_loop()
        request, _ = loop.run_until_complete(start(engine, runner, greedy(60, ignore_eos=True)))
        loop.close()
        runner.let_go()
        run(complete(engine, [5], greedy(3, ignore_eos=True)))
        assert engine.stats().num_used_blocks == 0
        assert len(runner.steps) < 10
        del request


def test_stop_ends_all_requests_and_refuses_new_ones() -> None:
    """Running and waiting requests end with Draining, later ones are refused, the thread ends."""
    runner = FakeRunner(repeat(7), is_held=True)
    endless = 100_000

    async def stopped() -> None:
        first, _ = await start(engine, runner, greedy(endless, ignore_eos=True))
        waiting = asyncio.ensure_future(complete(engine, [4], greedy(5)))
        await asyncio.sleep(0)
        stop = asyncio.ensure_future(asyncio.to_thread(engine.stop))
        runner.let_go()
        await stop
        with pytest.raises(Draining):
            async for _ in first:
                pass
        with pytest.raises(Draining):
            await waiting
        with pytest.raises(Draining):
            await complete(engine, [4], greedy(5))

    room = {"max_model_len": endless + 2, "num_blocks": endless}
    with running(runner, max_num_seqs=1, **room) as engine:
        assert engine.is_alive
        run(stopped())
        assert not engine.is_alive
        assert engine.stats().num_used_blocks == 0
