"""The engine with our Mixtral in float32, against transformers' `generate` and against itself.

Tokens may differ only where the two best logits lie within 1e-4: different shapes of the same
product round differently. Each comparison counts how often that excuse was needed.
"""

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from serve_app.engine.engine import Engine
from serve_app.engine.runner import ModelRunner
from serve_app.engine.sequence import SamplingParams
from serve_app.errors import InternalError
from serve_app.model.mixtral import Mixtral
from tests.engine.fake import complete, run, running
from tests.model.driver import load_float32, random_oracle

BLOCK_SIZE = 4
NUM_TOKENS = 24
NEAR = 1e-4


@dataclass(frozen=True)
class Pair:
    """Our model, and transformers' with the same random weights."""

    ours: Mixtral
    oracle: Any


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    oracle = random_oracle(seed=3)
    folder: Path = tmp_path_factory.mktemp("mixtral")
    oracle.save_pretrained(folder)
    return Pair(load_float32(folder), oracle)


@contextmanager
def serving(model: Mixtral, num_blocks: int = 512, max_step_tokens: int = 64) -> Iterator[Engine]:
    runner = ModelRunner(model, num_blocks, BLOCK_SIZE, torch.float32, torch.device("cpu"))
    with running(
        runner,
        max_model_len=256,
        max_running=32,
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks,
        max_step_tokens=max_step_tokens,
    ) as engine:
        yield engine


def prompts(count: int, seed: int, longest: int = 40) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(96) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def greedy(**how: Any) -> SamplingParams:
    return SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True, **how)


def together(engine: Engine, requests: list[tuple[list[int], SamplingParams]]) -> list[Any]:
    async def gather() -> list[Any]:
        return await asyncio.gather(*(complete(engine, *request) for request in requests))

    return run(gather())


def answers(engine: Engine, some: list[list[int]], params: SamplingParams) -> list[list[int]]:
    return [tokens for tokens, _, _ in together(engine, [(prompt, params) for prompt in some])]


def count_near_ties(oracle: Any, prompt: list[int], one: list[int], other: list[int]) -> int:
    """0 for equal answers, 1 for those that part where the two best logits nearly tie."""
    if one == other:
        return 0
    assert len(one) == len(other)
    place = next(i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
    logits = oracle(torch.tensor([prompt + one[:place]])).logits[0, -1]
    best = logits.topk(2)
    assert set(best.indices.tolist()) == {one[place], other[place]}
    assert best.values[0] - best.values[1] < NEAR
    return 1


def assert_same(pair: Pair, some: list[list[int]], one: list[Any], other: list[Any]) -> None:
    """Equal but for near ties, of which there may be one in a thousand tokens."""
    near_ties = sum(
        count_near_ties(pair.oracle, *case) for case in zip(some, one, other, strict=True)
    )
    assert near_ties <= max(1, len(some) * NUM_TOKENS // 1000)


def test_greedy_tokens_are_those_of_transformers_generate(pair: Pair) -> None:
    """32 prompts in one batch, cut into chunks, give what `generate` gives each alone."""
    some = prompts(32, seed=1)
    expected = [
        pair.oracle.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        for prompt in some
    ]
    with serving(pair.ours) as engine:
        assert_same(pair, some, expected, answers(engine, some, greedy()))


def test_greedy_tokens_are_the_same_alone_and_among_strangers(pair: Pair) -> None:
    """Each of 32, beside 31 others that sample as they like, gets what it gets alone."""
    some = prompts(32, seed=2)
    with serving(pair.ours) as engine:
        alone = [answers(engine, [prompt], greedy())[0] for prompt in some]
        assert_same(pair, some, alone, answers(engine, some, greedy()))
        strangers = [
            (prompt, SamplingParams(max_tokens=5 + i, temperature=1.5, seed=i, top_p=0.9))
            for i, prompt in enumerate(prompts(31, seed=3))
        ]
        for i in (0, 7, 31):
            mixed = together(engine, [*strangers, (some[i], greedy())])
            assert_same(pair, [some[i]], [alone[i]], [mixed[-1][0]])


def test_greedy_tokens_are_the_same_after_preemptions(pair: Pair) -> None:
    """With too few blocks for all, those that were thrown out and computed anew cannot tell."""
    some = prompts(32, seed=4, longest=20)
    with serving(pair.ours) as engine:
        undisturbed = answers(engine, some, greedy())
        assert engine.stats().preemptions == 0
    with serving(pair.ours, num_blocks=40) as engine:
        disturbed = answers(engine, some, greedy())
        assert engine.stats().preemptions >= 5
        assert engine.stats().kv_blocks_used == 0
    assert_same(pair, some, undisturbed, disturbed)


def test_a_prompt_of_many_chunks_gives_what_one_chunk_gives(pair: Pair) -> None:
    """200 tokens in steps of 32, beside decoding streams, or in one step: the same tokens."""
    long = prompts(1, seed=5, longest=1)[0] * 100 + prompts(1, seed=6)[0] * 3
    some = [long[:200], *prompts(7, seed=7)]
    with serving(pair.ours, max_step_tokens=512) as engine:
        whole = answers(engine, some, greedy())
    with serving(pair.ours, max_step_tokens=32) as engine:
        cut = answers(engine, some, greedy())
        assert engine.stats().steps > NUM_TOKENS + len(some[0]) // 32
    assert_same(pair, some, whole, cut)


def test_a_seeded_request_repeats_itself_in_any_company(pair: Pair) -> None:
    """Sampled with a seed, it gives the same tokens alone, among strangers and when preempted."""
    params = [
        SamplingParams(
            max_tokens=NUM_TOKENS,
            temperature=0.8,
            top_p=0.95,
            frequency_penalty=0.2,
            seed=i,
            ignore_eos=True,
        )
        for i in range(32)
    ]
    requests = list(zip(prompts(32, seed=8, longest=20), params, strict=True))
    with serving(pair.ours) as engine:
        alone = [together(engine, [request])[0] for request in requests]
        in_company = together(engine, requests)
    with serving(pair.ours, num_blocks=40) as engine:
        preempted = together(engine, requests)
        assert engine.stats().preemptions >= 5
    # One may part from itself where rounding tips two scores that nearly tie.
    for found in (in_company, preempted):
        assert sum(a != b for a, b in zip(alone, found, strict=True)) <= 1


def test_numbers_that_are_not_finite_stay_with_their_request(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that computes NaN fails alone, and whoever gets its blocks computes none."""
    poison, asked = 5, [[1], [4, 6, 7]]
    embedding = pair.ours.embedding.clone()
    embedding[poison] = torch.nan
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)

    def answers() -> list[Any]:
        # As few blocks as one request needs: the second one gets the first one's.
        with serving(pair.ours, num_blocks=3) as engine:

            async def one_by_one() -> list[Any]:
                try:
                    await complete(engine, [1, poison, 2, 3, 4, 6], params)
                except InternalError:
                    pass
                return [await complete(engine, prompt, params) for prompt in asked]

            return run(one_by_one())

    expected = answers()
    monkeypatch.setattr(pair.ours, "embedding", torch.nn.Parameter(embedding, False))
    assert answers() == expected
