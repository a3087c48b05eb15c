"""A failure ends its own requests; three failed steps in a row end the engine."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
import torch
from torch import Tensor

from serve_app.engine.delta import Delta
from serve_app.engine.scheduled_tokens import ScheduledTokens
from serve_app.engine.sequence import Sequence
from serve_app.errors import EngineDead, InternalError, OutOfMemory, ServeError
from tests.engine.fake import FakeRunner, complete, greedy, logits_of, run, running, start

POISON = 13
"""A prompt with this token makes its step, or its logits, fail."""


def poisoned_logits(token_ids: list[int]) -> Tensor:
    logits = logits_of(token_ids)
    if token_ids[0] == POISON and len(token_ids) >= 5:
        logits[20] = torch.nan
    return logits


def fail_on_poison(scheduled: list[ScheduledTokens]) -> None:
    if any(
        POISON in part.sequence.token_ids[: part.sequence.num_prompt_tokens] for part in scheduled
    ):
        raise torch.OutOfMemoryError("too much")


async def drain(request: AsyncGenerator[Delta, None], tokens: list[int]) -> None:
    async for delta in request:
        tokens += delta.token_ids


def test_logits_that_are_not_finite_fail_their_request_only() -> None:
    """A request with NaN logits gets its earlier tokens, then InternalError; the other requests of
    the batch get their usual answers."""
    prompts = [[1, 2], [POISON, 2], [3, 4]]
    params = greedy(12, ignore_eos=True)

    async def together() -> list[Any]:
        return await asyncio.gather(
            *(complete(engine, prompt, params) for prompt in prompts), return_exceptions=True
        )

    async def early_tokens() -> list[int]:
        tokens: list[int] = []
        with pytest.raises(InternalError):
            await drain(engine.generate(prompts[1], params), tokens)
        return tokens

    with running(FakeRunner(poisoned_logits)) as engine:
        first, broken, third = run(together())
        assert isinstance(broken, InternalError)
        assert len(run(early_tokens())) == 3
        assert engine.stats().num_used_blocks == 0
        assert run(complete(engine, prompts[0], params)) == first
        assert run(complete(engine, prompts[2], params)) == third


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("secret"), OutOfMemory),
        (ZeroDivisionError("secret"), InternalError),
        (InternalError("A sentence."), InternalError),
    ],
    ids=["memory", "other", "ours"],
)
def test_a_failed_step_ends_its_sequences_and_no_others(
    error: Exception, expected: type[ServeError]
) -> None:
    """The step's sequences get an error each, without foreign text; waiting sequences run."""

    def fail_on_poison(scheduled: list[ScheduledTokens]) -> None:
        if any(part.sequence.token_ids[0] == POISON for part in scheduled):
            raise error

    runner = FakeRunner(is_held=True, before=fail_on_poison)

    async def fail() -> None:
        # While its second and last step is held, the others arrive; two of them fill the places.
        first, _ = await start(engine, runner, greedy(2, ignore_eos=True))
        failing = [
            asyncio.ensure_future(complete(engine, [token, 1], greedy(4))) for token in (POISON, 2)
        ]
        waiting = asyncio.ensure_future(complete(engine, [3, 4], greedy(4, ignore_eos=True)))
        await asyncio.sleep(0)
        runner.let_go()
        await drain(first, [])
        errors = await asyncio.gather(*failing, return_exceptions=True)
        assert [type(error) for error in errors] == [expected, expected]
        assert errors[0] is not errors[1]
        assert "secret" not in str(errors[0])
        assert len((await waiting)[0]) == 4
        assert engine.stats().num_used_blocks == 0

    with running(runner, max_num_seqs=2) as engine:
        run(fail())
        assert engine.is_alive


def test_failures_with_a_success_between_do_not_end_the_engine() -> None:
    """Only failed steps in a row count."""
    with running(FakeRunner(before=fail_on_poison)) as engine:
        for _ in range(3):
            for _ in range(2):
                with pytest.raises(OutOfMemory):
                    run(complete(engine, [POISON], greedy(4)))
            run(complete(engine, [1], greedy(1)))
        assert engine.is_alive


def test_three_failed_steps_in_a_row_end_the_engine() -> None:
    """Three requests get their errors; waiting and later ones get EngineDead."""
    runner = FakeRunner(is_held=True, before=fail_on_poison)

    async def die() -> list[Any]:
        requests = [
            asyncio.ensure_future(complete(engine, [POISON, i], greedy(4))) for i in range(5)
        ]
        await asyncio.sleep(0)
        runner.let_go()
        return [type(e) for e in await asyncio.gather(*requests, return_exceptions=True)]

    with running(runner, max_num_seqs=1) as engine:
        assert run(die()) == [OutOfMemory] * 3 + [EngineDead] * 2
        with pytest.raises(EngineDead):
            run(complete(engine, [1], greedy(4)))
        assert not engine.is_alive
        assert engine.stats().num_running == engine.stats().num_waiting == 0
        engine.stop()
        with pytest.raises(EngineDead):
            run(complete(engine, [1], greedy(4)))


def test_an_error_in_the_scheduler_ends_all_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the scheduler raises, running and later requests get EngineDead."""
    runner = FakeRunner(is_held=True)

    async def die() -> None:
        request, _ = await start(engine, runner, greedy(9, ignore_eos=True))

        def schedule() -> list[ScheduledTokens]:
            raise ZeroDivisionError

        monkeypatch.setattr(engine._core.scheduler, "schedule", schedule)
        runner.let_go()
        with pytest.raises(EngineDead):
            await drain(request, [])
        with pytest.raises(EngineDead):
            await complete(engine, [1], greedy(4))

    with running(runner) as engine:
        run(die())


def test_an_error_while_requests_are_taken_ends_all_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """When the scheduler refuses one of three requests that are taken together, each of them gets
    EngineDead."""
    runner = FakeRunner(is_held=True)

    def add(sequence: Sequence) -> None:
        raise ZeroDivisionError

    async def die() -> list[Any]:
        first, _ = await start(engine, runner, greedy(2, ignore_eos=True))
        monkeypatch.setattr(engine._core.scheduler, "add", add)
        requests = [asyncio.ensure_future(complete(engine, [i], greedy(4))) for i in range(3)]
        await asyncio.sleep(0)
        runner.let_go()
        await drain(first, [])
        return [type(e) for e in await asyncio.gather(*requests, return_exceptions=True)]

    with running(runner) as engine:
        assert run(die()) == [EngineDead] * 3
