"""One start for all who wait; what becomes of the others when it fails or one of them leaves."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from serve_app.errors import EngineDead, ModelLoadFailed
from serve_app.node.client import Forward
from serve_app.protocol.call import Call
from serve_app.worker.supervisor import StartupSupervisor


async def echo(call: Call) -> AsyncGenerator[Any, None]:
    yield {"body": call.body}


class Start:
    """A start that waits for `go` and then does what `outcomes` say, one after the other."""

    def __init__(self, *outcomes: Forward | Exception) -> None:
        self.outcomes = list(outcomes)
        self.go = asyncio.Event()
        self.num_calls = 0

    async def __call__(self) -> Forward:
        self.num_calls += 1
        await self.go.wait()
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def test_all_who_wait_share_one_start() -> None:
    """Ten jobs at once start the model once, and the status says how far it is."""

    async def scenario() -> None:
        start = Start(echo)
        supervisor = StartupSupervisor(start)
        seen = [supervisor.status]
        waiters = [asyncio.create_task(supervisor.ready()) for _ in range(10)]
        await asyncio.sleep(0)
        seen.append(supervisor.status)
        start.go.set()
        assert await asyncio.gather(*waiters) == [echo] * 10
        assert [*seen, supervisor.status] == ["idle", "loading", "ready"]
        assert start.num_calls == 1
        assert await supervisor.ready() is echo

    asyncio.run(scenario())


def test_a_failure_reaches_all_and_the_next_job_tries_again() -> None:
    """A cause that may pass does not condemn the worker."""

    async def scenario() -> None:
        start = Start(ModelLoadFailed("The network is down.", retry=True), echo)
        start.go.set()
        supervisor = StartupSupervisor(start)
        results = await asyncio.gather(
            *(supervisor.ready() for _ in range(3)), return_exceptions=True
        )
        assert [str(result) for result in results] == ["The network is down."] * 3
        assert (start.num_calls, supervisor.status) == (1, "failed")
        assert await supervisor.ready() is echo
        assert start.num_calls == 2

    asyncio.run(scenario())


def test_a_final_failure_is_not_tried_again() -> None:
    """A broken checkpoint stays broken: later jobs hear so at once."""

    async def scenario() -> None:
        start = Start(ModelLoadFailed("model.safetensors is cut off."))
        start.go.set()
        supervisor = StartupSupervisor(start)
        for _ in range(2):
            with pytest.raises(ModelLoadFailed, match="cut off"):
                await supervisor.ready()
        assert start.num_calls == 1

    asyncio.run(scenario())


def test_an_unforeseen_failure_tells_nothing_internal() -> None:
    """A bug while starting becomes MODEL_LOAD_FAILED, without the exception's own text."""

    async def scenario() -> None:
        start = Start(OSError("/secret/path"))
        start.go.set()
        with pytest.raises(ModelLoadFailed) as caught:
            await StartupSupervisor(start).ready()
        assert caught.value.retry
        assert "secret" not in caught.value.message

    asyncio.run(scenario())


def test_one_who_leaves_does_not_stop_the_start() -> None:
    """A cancelled job leaves the load to the jobs that still wait."""

    async def scenario() -> None:
        start = Start(echo)
        supervisor = StartupSupervisor(start)
        leaving, staying = (asyncio.create_task(supervisor.ready()) for _ in range(2))
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.sleep(0)
        start.go.set()
        assert await staying is echo
        assert leaving.cancelled()

    asyncio.run(scenario())


class Life:
    """Starts `echo` each time, and dies when the test says so."""

    def __init__(self, *outcomes: Forward | Exception) -> None:
        self.start = Start(*outcomes)
        self.start.go.set()
        self.is_dying = False
        self.told: list[str] = []
        self.supervisor = StartupSupervisor(
            self.start,
            watch=self.watch,
            stop=self.stop,
            gave_up=lambda: self.told.append("gave up"),
        )

    async def watch(self) -> str:
        while not self.is_dying:  # noqa: ASYNC110  an Event belongs to one loop
            await asyncio.sleep(0)
        self.is_dying = False
        return "the model's process"

    async def stop(self) -> None:
        self.told.append("stopped")

    async def die(self) -> None:
        """Returns when the worker knows."""
        client = self.supervisor.client
        assert client is not None
        self.is_dying = True
        await self.supervisor.wait_for_death(client)


def other(call: Call) -> AsyncGenerator[Any, None]:
    return echo(call)


def test_a_dead_model_is_taken_down_and_started_again() -> None:
    """Those who come meanwhile wait for the new one; once it has answered, so it may die again."""

    async def scenario() -> None:
        life = Life(echo, other, echo)
        assert await life.supervisor.ready() is echo
        life.start.go.clear()
        await life.die()
        assert (life.supervisor.status, life.supervisor.client) == ("loading", None)
        life.start.go.set()
        assert await life.supervisor.ready() is other
        life.supervisor.answered(other)
        await life.die()
        assert await life.supervisor.ready() is echo
        assert life.told == ["stopped", "stopped"]

    asyncio.run(scenario())


def test_a_model_that_dies_before_it_answers_is_given_up() -> None:
    """The second death in a row is the end: all jobs hear of it, and no third start is tried."""

    async def scenario() -> None:
        life = Life(echo, other)
        await life.supervisor.ready()
        life.supervisor.answered(echo)
        await life.die()
        assert await life.supervisor.ready() is other
        life.supervisor.answered(echo)  # the answer of the dead one, which proves nothing
        await life.die()
        for _ in range(2):
            with pytest.raises(EngineDead, match="again before it had answered"):
                await life.supervisor.ready()
        await asyncio.sleep(0)
        assert (life.supervisor.status, life.start.num_calls) == ("failed", 2)
        assert sorted(life.told) == ["gave up", "stopped", "stopped"]

    asyncio.run(scenario())


def test_a_restart_that_fails_is_not_tried_again() -> None:
    """Whoever waits for it, and whoever comes later, hears the cause; even one that may pass."""

    async def scenario() -> None:
        life = Life(echo, ModelLoadFailed("The network is down.", retry=True))
        await life.supervisor.ready()
        await life.die()
        for _ in range(2):
            with pytest.raises(ModelLoadFailed, match="network"):
                await life.supervisor.ready()
        assert life.told == ["stopped", "gave up"]
        assert (life.supervisor.status, life.start.num_calls) == ("failed", 2)

    asyncio.run(scenario())


def test_a_model_of_another_event_loop_is_watched() -> None:
    """Started before the SDK's own loop, in one that has ended since."""
    life = Life(echo, other)
    asyncio.run(life.supervisor.ready())

    async def scenario() -> None:
        assert await life.supervisor.ready() is echo
        await life.die()
        assert await life.supervisor.ready() is other

    asyncio.run(scenario())
