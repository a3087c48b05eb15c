"""One start for all jobs that wait; failures, restarts, and jobs that stop waiting."""

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
    """A start that waits for `go` and then returns or raises the next of `outcomes`."""

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


def test_waiting_jobs_share_one_start() -> None:
    """Ten jobs at once start the model once, and `status` follows the start."""

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
    """A failure with `retry` fails the jobs that wait; the next job starts the model again."""

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
    """A failure without `retry` fails later jobs at once, without another start."""

    async def scenario() -> None:
        start = Start(ModelLoadFailed("model.safetensors is cut off."))
        start.go.set()
        supervisor = StartupSupervisor(start)
        for _ in range(2):
            with pytest.raises(ModelLoadFailed, match="cut off"):
                await supervisor.ready()
        assert start.num_calls == 1

    asyncio.run(scenario())


def test_an_unforeseen_failure_shows_nothing_internal() -> None:
    """A bug while starting becomes MODEL_LOAD_FAILED, without the exception's own text."""

    async def scenario() -> None:
        start = Start(OSError("/secret/path"))
        start.go.set()
        with pytest.raises(ModelLoadFailed) as caught:
            await StartupSupervisor(start).ready()
        assert caught.value.retry
        assert "secret" not in caught.value.message

    asyncio.run(scenario())


def test_a_cancelled_job_does_not_stop_the_start() -> None:
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
    """A model with a supervisor; it dies when `die` is called."""

    def __init__(self, *outcomes: Forward | Exception) -> None:
        self.start = Start(*outcomes)
        self.start.go.set()
        self.is_dying = False
        self.events: list[str] = []
        self.supervisor = StartupSupervisor(
            self.start,
            watch=self.watch,
            stop=self.stop,
            gave_up=lambda: self.events.append("gave up"),
        )

    async def watch(self) -> str:
        while not self.is_dying:  # noqa: ASYNC110  an Event belongs to one loop
            await asyncio.sleep(0)
        self.is_dying = False
        return "the model's process"

    async def stop(self) -> None:
        self.events.append("stopped")

    async def die(self) -> None:
        """Kills the model, and returns when the supervisor has noticed."""
        client = self.supervisor.client
        assert client is not None
        self.is_dying = True
        await self.supervisor.wait_for_death(client)


def other(call: Call) -> AsyncGenerator[Any, None]:
    return echo(call)


def test_a_dead_model_is_stopped_and_started_again() -> None:
    """A dead model is stopped and restarted; after an answer it may die and restart again."""

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
        assert life.events == ["stopped", "stopped"]

    asyncio.run(scenario())


def test_a_model_that_dies_before_it_answers_is_given_up() -> None:
    """After a second death without an answer every job fails and no third start is tried."""

    async def scenario() -> None:
        life = Life(echo, other)
        await life.supervisor.ready()
        life.supervisor.answered(echo)
        await life.die()
        assert await life.supervisor.ready() is other
        life.supervisor.answered(echo)  # an answer of the dead model, which does not count
        await life.die()
        for _ in range(2):
            with pytest.raises(EngineDead, match="again before the model answered"):
                await life.supervisor.ready()
        await asyncio.sleep(0)
        assert (life.supervisor.status, life.start.num_calls) == ("failed", 2)
        assert sorted(life.events) == ["gave up", "stopped", "stopped"]

    asyncio.run(scenario())


def test_a_restart_that_fails_is_not_tried_again() -> None:
    """A failed restart fails all jobs with its cause, even one with `retry`."""

    async def scenario() -> None:
        life = Life(echo, ModelLoadFailed("The network is down.", retry=True))
        await life.supervisor.ready()
        await life.die()
        for _ in range(2):
            with pytest.raises(ModelLoadFailed, match="network"):
                await life.supervisor.ready()
        assert life.events == ["stopped", "gave up"]
        assert (life.supervisor.status, life.start.num_calls) == ("failed", 2)

    asyncio.run(scenario())


def test_a_model_of_another_event_loop_is_watched() -> None:
    """A model that was started in an event loop that has ended is watched in the next one."""
    life = Life(echo, other)
    asyncio.run(life.supervisor.ready())

    async def scenario() -> None:
        assert await life.supervisor.ready() is echo
        await life.die()
        assert await life.supervisor.ready() is other

    asyncio.run(scenario())
