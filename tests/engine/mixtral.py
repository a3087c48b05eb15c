"""Our Mixtral in float32 in an engine, and the comparison of its answers.

Two answers may differ only where the two best logits lie within 1e-4: products of different shapes
round differently. Each comparison counts these near ties and limits their number.
"""

import asyncio
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from serve_app.engine.engine import Engine
from serve_app.engine.model_runner import ModelRunner
from serve_app.engine.sampling_params import SamplingParams
from serve_app.model.mixtral import Mixtral
from tests.engine.fake import complete, run, running

BLOCK_SIZE = 4
NUM_TOKENS = 24
NEAR = 1e-4


@dataclass(frozen=True)
class Pair:
    """Our model, and transformers' model with the same random weights."""

    ours: Mixtral
    oracle: Any


class OverlappingRunner(ModelRunner):
    """Lets the engine launch a step before it collects the last one, as on a GPU."""

    can_overlap_steps = True
    few_prompt_tokens = 0


@contextmanager
def serving(
    model: Mixtral,
    num_blocks: int = 512,
    max_num_batched_tokens: int = 64,
    enable_prefix_caching: bool = True,
    can_overlap_steps: bool = False,
    prepare: Callable[[ModelRunner], None] = lambda runner: None,
) -> Iterator[Engine]:
    cpu = torch.device("cpu")
    kind = OverlappingRunner if can_overlap_steps else ModelRunner
    runner = kind(model, num_blocks, BLOCK_SIZE, torch.float32, cpu)
    prepare(runner)
    with running(
        runner,
        max_model_len=256,
        max_num_seqs=32,
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks,
        max_num_batched_tokens=max_num_batched_tokens,
        enable_prefix_caching=enable_prefix_caching,
    ) as engine:
        yield engine


@contextmanager
def poisoned(model: Mixtral, token: int) -> Iterator[None]:
    """Sets the embedding of `token` to NaN inside the block."""
    row = model.embedding.data[token]
    before = row.clone()
    row.fill_(torch.nan)
    try:
        yield
    finally:
        row.copy_(before)


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
    """Returns 0 for equal answers, and 1 where the first difference is a near tie of two logits."""
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
    """Asserts equal answers, with at most one near tie in a thousand tokens."""
    near_ties = sum(
        count_near_ties(pair.oracle, *case) for case in zip(some, one, other, strict=True)
    )
    assert near_ties <= max(1, len(some) * NUM_TOKENS // 1000)
