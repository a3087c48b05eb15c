"""A step that does not return ends the engine."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.engine.watchdog import SLACK, Watchdog
from serve_app.errors import EngineDead
from tests.engine.fake import FakeRunner, complete, greedy, run, running, start


def test_a_step_that_does_not_return_ends_all_requests() -> None:
    """A running and a waiting request get EngineDead while the step still hangs, and so do later
    ones; the engine is dead."""
    runner = FakeRunner(is_held=True)

    async def hang() -> None:
        first, _ = await start(engine, runner, greedy(9, ignore_eos=True))
        second = asyncio.ensure_future(complete(engine, [1], greedy(4)))
        await asyncio.sleep(0)
        engine._core.watchdog._began = float("-inf")  # the step that is held began long ago
        engine.end_if_hung()
        with pytest.raises(EngineDead):
            async for _ in first:
                pass
        with pytest.raises(EngineDead):
            await second
        with pytest.raises(EngineDead):
            await complete(engine, [1], greedy(4))
        assert not engine.is_alive

    with running(runner) as engine:
        run(hang())
        runner.let_go()


def test_a_step_that_returns_late_finds_no_sequence() -> None:
    """If a hung step returns late, the engine's thread ends and no sequence is left."""
    runner = FakeRunner(is_held=True)

    async def hang() -> None:
        request, _ = await start(engine, runner, greedy(9, ignore_eos=True))
        engine._core.watchdog._began = float("-inf")
        engine.end_if_hung()
        with pytest.raises(EngineDead):
            async for _ in request:
                pass

    with running(runner) as engine:
        run(hang())
        runner.let_go()
        engine._thread.join()
        assert (engine.stats().num_running, engine.stats().num_used_blocks) == (0, 0)


def test_a_stop_does_not_wait_for_a_step_that_hangs(caplog: pytest.LogCaptureFixture) -> None:
    """`stop` returns while the step still hangs; the request ends with EngineDead, and the log says
    why."""
    runner = FakeRunner(is_held=True)

    async def stopped() -> None:
        request, _ = await start(engine, runner, greedy(9, ignore_eos=True))
        await asyncio.to_thread(engine.stop)
        with pytest.raises(EngineDead):
            async for _ in request:
                pass
        assert engine._thread.is_alive()
        assert not engine.is_alive

    with running(runner, step_timeout_s=0.2) as engine:
        engine._core.watchdog._longest_s = 0.0
        run(stopped())
        runner.let_go()
    assert "its step does not return" in caplog.text


def test_a_step_in_time_ends_nothing() -> None:
    """While a step is within its time, the request goes on to its end."""
    runner = FakeRunner(is_held=True)

    async def answered() -> int:
        request, first = await start(engine, runner, greedy(9, ignore_eos=True))
        engine.end_if_hung()
        runner.let_go()
        return len(first.token_ids) + sum([len(delta.token_ids) async for delta in request])

    with running(runner) as engine:
        assert run(answered()) == 9
        assert engine.is_alive


@given(st.lists(st.floats(0, 100)), st.floats(0.1, 100), st.floats(0, 3000))
def test_the_limit_follows_the_longest_turn(
    turns: list[float], timeout_s: float, seconds: float
) -> None:
    """A turn has hung after the timeout, or after ten times the longest turn, if that is more."""
    now = 0.0
    watchdog = Watchdog(timeout_s, lambda: now)
    for turn in turns:
        now = 0.0
        with watchdog:
            now = turn
    now = 0.0
    with watchdog:
        now = seconds
        assert watchdog.has_hung == (seconds > max(timeout_s, *(SLACK * it for it in turns), 0))
    assert not watchdog.has_hung  # a thread that waits for requests has not hung
