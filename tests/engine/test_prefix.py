"""Prefix caching with our Mixtral: answers are the same with cached blocks and without."""

import asyncio
import random
from typing import Any

import pytest

from serve_app.engine.engine import Engine
from serve_app.errors import InternalError
from tests.engine.fake import complete, run
from tests.engine.mixtral import (
    Pair,
    answers,
    assert_same,
    greedy,
    poisoned,
    prompts,
    serving,
)

NUM_TURNS = 3


def turns(engine: Engine) -> tuple[list[list[int]], list[list[int]]]:
    """Runs 24 conversations of three turns with a common prefix. Returns prompts and answers.

    The prompt of a turn is the whole conversation before it, and a new question.
    """
    system = prompts(1, seed=1, longest=1)[0] * 21
    asked: list[list[int]] = []
    said: list[list[int]] = []

    async def talk(seed: int) -> None:
        prompt = list(system)
        for question in prompts(NUM_TURNS, seed, longest=9):
            prompt += question
            tokens, _, _ = await complete(engine, prompt, greedy())
            asked.append(list(prompt))
            said.append(tokens)
            prompt += tokens

    async def all_talk() -> None:
        await asyncio.gather(*(talk(seed) for seed in range(24)))

    run(all_talk())
    order = sorted(range(len(asked)), key=lambda i: asked[i])
    return [asked[i] for i in order], [said[i] for i in order]


@pytest.mark.parametrize("num_blocks", [2048, 60])
def test_conversations_are_the_same_with_the_cache_and_without(pair: Pair, num_blocks: int) -> None:
    """With room for all and with preemptions, the same prompts get the same tokens."""
    with serving(pair.ours, num_blocks=num_blocks) as engine:
        asked, said = turns(engine)
        stats = engine.stats()
    assert stats.prefix_cache_hits > 1000
    assert (stats.num_preemptions > 0) == (num_blocks == 60)
    assert stats.num_used_blocks == 0
    with serving(pair.ours, num_blocks=2048, enable_prefix_caching=False) as engine:
        plain = answers(engine, asked, greedy())
        assert engine.stats().prefix_cache_hits == engine.stats().prefix_cache_queries == 0
    assert_same(pair, asked, plain, said)


def test_an_abort_leaves_shared_blocks_alone(pair: Pair) -> None:
    """Half of the requests with one prompt are aborted; the other half get their full answers."""
    prompt = prompts(1, seed=5, longest=1)[0] * 30
    rng = random.Random(6)

    async def leave(engine: Engine) -> None:
        request = engine.generate(prompt, greedy())
        num_left = rng.randint(1, 10)
        while num_left > 0:
            num_left -= len((await anext(request)).token_ids)
        await request.aclose()

    async def run_all(engine: Engine) -> list[Any]:
        staying = [asyncio.create_task(complete(engine, prompt, greedy())) for _ in range(12)]
        await asyncio.gather(*(leave(engine) for _ in range(12)))
        return list(await asyncio.gather(*staying))

    with serving(pair.ours, enable_prefix_caching=False) as engine:
        (alone,) = answers(engine, [prompt], greedy())
    with serving(pair.ours, num_blocks=120) as engine:
        found = [tokens for tokens, _, _ in run(run_all(engine))]
        found += answers(engine, [prompt], greedy())
        assert engine.stats().num_used_blocks == 0
    assert_same(pair, [prompt] * 13, [alone] * 13, found)


def test_a_failed_request_leaves_the_prefix_cache_alone(pair: Pair) -> None:
    """A NaN after a shared prefix is never cached, and the prefix stays usable."""
    poison = 5
    good = [7] * 20
    bad = [*good[:16], poison, *good]
    with serving(pair.ours, enable_prefix_caching=False) as engine:
        (alone,) = answers(engine, [good], greedy())

    async def run_all(engine: Engine) -> list[Any]:
        kept = await complete(engine, good, greedy())
        for _ in range(2):  # the second would share what the first one left
            with pytest.raises(InternalError):
                await complete(engine, bad, greedy())
        beside = asyncio.create_task(complete(engine, good, greedy()))
        with pytest.raises(InternalError):
            await complete(engine, bad, greedy())
        return [kept, await beside, await complete(engine, good, greedy())]

    with poisoned(pair.ours, poison), serving(pair.ours) as engine:
        found = [tokens for tokens, _, _ in run(run_all(engine))]
        # 16 tokens each for those after the first; of the poisoned no block beyond those.
        assert engine.stats().prefix_cache_hits == 5 * 16
    assert_same(pair, [good] * 3, [alone] * 3, found)
