"""KV blocks are finite when they are handed out, whatever their last owner left in them."""

import asyncio

import pytest

from serve_app.engine.scheduled_tokens import ScheduledTokens
from tests.engine.fake import FakeRunner, complete, greedy, run, running

POISON = 13
"""The prefill of a prompt with this token leaves numbers that are not finite in its blocks."""


class PoisonedRunner(FakeRunner):
    """Remembers which blocks are not finite, and counts the steps that would read one."""

    def __init__(self, *, is_held: bool = False) -> None:
        self.poisoned: set[int] = set()
        self.num_read = 0
        super().__init__(before=self._compute, is_held=is_held)

    def _compute(self, scheduled: list[ScheduledTokens]) -> None:
        for part in scheduled:
            table = part.sequence.block_table
            if part.sequence.token_ids[0] == POISON:
                self.poisoned.update(table[part.start // 4 : -(-part.end // 4)])
                if part.is_sampled:
                    raise RuntimeError("the step failed half-way")
            else:
                self.num_read += bool(self.poisoned & set(table))

    def clear_blocks(self, blocks: list[int]) -> None:
        super().clear_blocks(blocks)
        self.poisoned -= set(blocks)


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_a_cancelled_prompt_leaves_no_poison(num_steps: int) -> None:
    """A prompt that is cancelled before its sampling step leaves NaN in its blocks; no later
    sequence reads one."""
    runner = PoisonedRunner(is_held=True)

    async def scenario() -> None:
        prompt = asyncio.ensure_future(complete(engine, [POISON] * 60, greedy(4)))
        runner.allow(num_steps)
        await runner.entered(num_steps + 1)
        assert runner.poisoned
        prompt.cancel()
        await asyncio.gather(prompt, return_exceptions=True)
        runner.let_go()
        innocents = (complete(engine, [i] * 30, greedy(4)) for i in range(1, 9))
        await asyncio.gather(*innocents)

    with running(runner, max_num_batched_tokens=10, num_blocks=16) as engine:
        run(scenario())
    assert runner.num_read == 0


def test_a_failed_step_leaves_no_poison() -> None:
    """A step that raises may have written anything into the blocks of its sequences."""
    runner = PoisonedRunner()

    async def scenario() -> None:
        for i in range(1, 5):
            bad = complete(engine, [POISON] * 8, greedy(4))
            await asyncio.gather(bad, return_exceptions=True)
            await complete(engine, [i] * 30, greedy(4))

    with running(runner, num_blocks=16) as engine:
        run(scenario())
    assert runner.num_read == 0


def test_answers_that_end_as_usual_clear_nothing() -> None:
    """Answers that end normally clear no blocks, because a sampled token shows that all values
    before it are finite."""
    runner = FakeRunner()

    async def scenario() -> None:
        prompts = (complete(engine, [i, 2, 3, 4, 5], greedy(9)) for i in range(1, 20))
        await asyncio.gather(*prompts)

    with running(runner) as engine:
        run(scenario())
    assert runner.cleared == []
