"""Progress updates while a job waits: in order, and none after the wait."""

import asyncio

import pytest

from serve_app.worker import progress
from tests import virtual_time


def test_updates_are_throttled_and_none_is_under_way_at_the_end() -> None:
    """Updates keep their interval, and none is under way when the wait is over."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        started: list[float] = []
        under_way = 0

        async def update() -> None:
            nonlocal under_way
            under_way += 1
            started.append(loop.time() - began)
            await asyncio.sleep(0.01)
            under_way -= 1

        result = await progress.while_waiting(asyncio.sleep(0.3, "ready"), update, 0.1)
        assert result == "ready"
        assert under_way == 0
        # The last one is under way at the end, and the wait lasts until it is over.
        assert started == pytest.approx([0, 0.11, 0.22])
        assert loop.time() - began == pytest.approx(0.3)

    virtual_time.run(scenario())


def test_a_failing_update_costs_the_job_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """A failed update is logged, and the job goes on."""

    async def update() -> None:
        raise OSError("connection reset")

    async def scenario() -> str:
        return await progress.while_waiting(asyncio.sleep(0.01, "ready"), update, 0.1)

    assert virtual_time.run(scenario()) == "ready"
    assert "OSError" in caplog.text


def test_an_update_that_never_ends_costs_the_job_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An update is given up after 5 s, which is shorter than a result may wait."""

    async def tell() -> None:
        await asyncio.Event().wait()

    async def scenario() -> str:
        loop = asyncio.get_running_loop()
        wait = asyncio.sleep(0.02, "ready")
        try:
            return await progress.while_waiting(wait, tell, 0.1)
        finally:
            assert loop.time() == pytest.approx(5.0)

    assert virtual_time.run(scenario()) == "ready"
    assert "TimeoutError" in caplog.text


def test_a_failed_load_ends_the_wait_with_its_error() -> None:
    """The wait raises what the load raises."""

    async def update() -> None:
        pass

    async def fail() -> None:
        raise ValueError("no checkpoint")

    with pytest.raises(ValueError, match="no checkpoint"):
        asyncio.run(progress.while_waiting(fail(), update, 0.1))


@pytest.mark.parametrize("num_turns", range(1, 12))
def test_a_job_can_be_stopped_at_any_moment(num_turns: int) -> None:
    """The wait ends when it is cancelled after any number of turns of the event loop."""

    async def update() -> None:
        pass

    async def scenario() -> bool:
        for_ever = asyncio.Event()
        waiting = asyncio.create_task(progress.while_waiting(for_ever.wait(), update, 60.0))
        for _ in range(num_turns):
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting}, timeout=1.0)
        return waiting.cancelled()

    assert asyncio.run(scenario())
