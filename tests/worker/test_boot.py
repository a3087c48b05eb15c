"""One start for all who wait; what becomes of the others when it fails or one of them leaves."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from serve_app.errors import ModelLoadFailed
from serve_app.protocol.call import Call
from serve_app.worker.boot import Boot
from serve_app.worker.forward import Forward


async def echo(call: Call) -> AsyncGenerator[dict[str, Any], None]:
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
        boot = Boot(start)
        seen = [boot.status]
        waiters = [asyncio.create_task(boot.ready()) for _ in range(10)]
        await asyncio.sleep(0)
        seen.append(boot.status)
        start.go.set()
        assert await asyncio.gather(*waiters) == [echo] * 10
        assert [*seen, boot.status] == ["idle", "loading", "ready"]
        assert start.num_calls == 1
        assert await boot.ready() is echo

    asyncio.run(scenario())


def test_a_failure_reaches_all_and_the_next_job_tries_again() -> None:
    """A cause that may pass does not condemn the worker."""

    async def scenario() -> None:
        start = Start(ModelLoadFailed("The network is down.", retry=True), echo)
        start.go.set()
        boot = Boot(start)
        results = await asyncio.gather(*(boot.ready() for _ in range(3)), return_exceptions=True)
        assert [str(result) for result in results] == ["The network is down."] * 3
        assert (start.num_calls, boot.status) == (1, "failed")
        assert await boot.ready() is echo
        assert start.num_calls == 2

    asyncio.run(scenario())


def test_a_final_failure_is_not_tried_again() -> None:
    """A broken checkpoint stays broken: later jobs hear so at once."""

    async def scenario() -> None:
        start = Start(ModelLoadFailed("model.safetensors is cut off."))
        start.go.set()
        boot = Boot(start)
        for _ in range(2):
            with pytest.raises(ModelLoadFailed, match="cut off"):
                await boot.ready()
        assert start.num_calls == 1

    asyncio.run(scenario())


def test_an_unforeseen_failure_tells_nothing_internal() -> None:
    """A bug while starting becomes MODEL_LOAD_FAILED, without the exception's own text."""

    async def scenario() -> None:
        start = Start(OSError("/secret/path"))
        start.go.set()
        with pytest.raises(ModelLoadFailed) as caught:
            await Boot(start).ready()
        assert caught.value.retry
        assert "secret" not in caught.value.message

    asyncio.run(scenario())


def test_one_who_leaves_does_not_stop_the_start() -> None:
    """A cancelled job leaves the load to the jobs that still wait."""

    async def scenario() -> None:
        start = Start(echo)
        boot = Boot(start)
        leaving, staying = (asyncio.create_task(boot.ready()) for _ in range(2))
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.sleep(0)
        start.go.set()
        assert await staying is echo
        assert leaving.cancelled()

    asyncio.run(scenario())
