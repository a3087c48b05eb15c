"""Several answers to one prompt: it is computed once, also after aborts, and each answer is that of
a single request."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.engine.delta import Delta
from serve_app.engine.engine import Engine
from serve_app.engine.sampling_params import SamplingParams
from serve_app.engine.sequence import SharedPrompt
from tests.engine.fake import FakeRunner, complete, greedy, joined, run, running, settled
from tests.engine.mixtral import Pair, assert_same, prompts, serving

PROMPT = [1 + i % 40 for i in range(30)]


async def choices(
    engine: Engine, prompt: list[int], params: list[SamplingParams]
) -> list[list[int]]:
    """Returns the tokens of one answer for each of `params`."""
    shared = SharedPrompt()

    async def answer(each: SamplingParams) -> list[int]:
        deltas = engine.generate(prompt, each, shared_prompt=shared)
        return joined([delta async for delta in deltas])[0]

    return await asyncio.gather(*(answer(each) for each in params))


def num_computed(runner: FakeRunner, prompt: list[int]) -> int:
    """Returns the tokens of `prompt` that all steps have computed."""
    return sum(
        max(0, min(part.end, len(prompt)) - part.start) for step in runner.steps for part in step
    )


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
@pytest.mark.parametrize("tokens", [8, 32])
def test_a_prompt_of_several_answers_is_computed_once(
    enable_prefix_caching: bool, tokens: int
) -> None:
    """All but the last block of 4 tokens is shared, in whatever chunks, with and without caching;
    without it no later request finds the prompt, be it one with several answers."""
    runner = FakeRunner()
    limits = {"enable_prefix_caching": enable_prefix_caching, "max_num_batched_tokens": tokens}
    with running(runner, **limits) as engine:
        run(choices(engine, PROMPT, [greedy(5, ignore_eos=True)] * 4))
        assert num_computed(runner, PROMPT) == 30 + 3 * 2
        run(complete(engine, PROMPT, greedy(1)))
        later = num_computed(runner, PROMPT) - (30 + 3 * 2)
        assert later == (2 if enable_prefix_caching else 30)
        run(choices(engine, PROMPT, [greedy(1)] * 2))
        others = num_computed(runner, PROMPT) - (30 + 3 * 2) - later
        assert others == (2 + 2 if enable_prefix_caching else 30 + 2)
        assert engine.stats().num_used_blocks == 0


def test_when_the_first_leaves_the_next_computes_the_prompt() -> None:
    """If a consumer is aborted before the prompt is computed, the others still get their
    answers."""
    runner = FakeRunner(is_held=True)

    async def scenario(engine: Engine) -> list[list[int]]:
        shared = SharedPrompt()
        busy = asyncio.create_task(complete(engine, [9], greedy(2, ignore_eos=True)))
        await runner.entered(1)
        tasks = []
        for _ in range(4):
            request = engine.generate(PROMPT, greedy(3, ignore_eos=True), shared_prompt=shared)
            tasks.append(asyncio.create_task(collect(request)))
            await asyncio.sleep(0)
        tasks[0].cancel()
        tasks[2].cancel()
        await asyncio.wait([tasks[0], tasks[2]])
        runner.let_go()
        await busy
        found = [joined(await tasks[index])[0] for index in (1, 3)]
        await settled(engine)
        assert engine.stats().num_used_blocks == 0
        return found

    with running(runner, max_num_batched_tokens=64) as engine:
        one, other = run(scenario(engine))
    assert one == other
    assert len(one) == 3
    assert num_computed(runner, PROMPT) <= 30 + 30 + 2 + 1


async def collect(request: AsyncGenerator[Delta, None]) -> list[Delta]:
    return [delta async for delta in request]


@settings(max_examples=40)
@given(
    num_blocks=st.integers(12, 60),
    choices_left=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 3)), min_size=1, max_size=5),
    enable_prefix_caching=st.booleans(),
)
def test_every_answer_ends_however_the_others_leave(
    num_blocks: int, choices_left: list[tuple[int, int]], enable_prefix_caching: bool
) -> None:
    """Groups of answers in a small cache, some of whose consumers leave after a few deltas: the
    others get all their tokens, and all blocks are free at the end."""

    async def answer(engine: Engine, index: int, shared: SharedPrompt, leave_after: int) -> None:
        params = SamplingParams(max_tokens=6, seed=index, ignore_eos=True)
        request = engine.generate(PROMPT, params, shared_prompt=shared)
        if index < leave_after:
            task = asyncio.create_task(collect(request))
            for _ in range(index):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            return
        assert len(joined(await collect(request))[0]) == 6

    async def scenario(engine: Engine) -> None:
        groups = [(SharedPrompt(), *each) for each in choices_left]
        await asyncio.gather(
            *(
                answer(engine, index, shared, leave_after)
                for shared, count, leave_after in groups
                for index in range(count)
            )
        )
        await settled(engine)
        assert engine.stats().num_used_blocks == 0

    limits = {"num_blocks": num_blocks, "max_num_seqs": 3}
    with running(FakeRunner(), enable_prefix_caching=enable_prefix_caching, **limits) as engine:
        run(scenario(engine))


@pytest.mark.parametrize("can_overlap_steps", [False, True])
@pytest.mark.parametrize("num_blocks", [512, 22])
def test_answers_are_the_same_as_alone(
    pair: Pair, can_overlap_steps: bool, num_blocks: int
) -> None:
    """Seeded answers to a shared prompt equal those of separate requests, also with preemptions, in
    both modes of the engine's loop."""
    prompt = prompts(1, seed=3, longest=1)[0] * 37
    base = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    params = [base, replace(base, temperature=1.0, seed=5), replace(base, temperature=1.0, seed=6)]
    with serving(pair.ours, enable_prefix_caching=False) as engine:
        alone = [run(complete(engine, prompt, each))[0] for each in params]
    with serving(pair.ours, num_blocks=num_blocks, can_overlap_steps=can_overlap_steps) as engine:
        found = run(choices(engine, prompt, params))
        assert (engine.stats().num_preemptions > 0) == (num_blocks == 22)
    assert_same(pair, [prompt], alone[:1], found[:1])
    assert found == alone
    assert found[1] != found[2]
