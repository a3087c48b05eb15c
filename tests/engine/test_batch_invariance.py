"""An answer depends on its own request alone: not on the batch, and not on preemptions."""

import asyncio
import random
from dataclasses import replace
from typing import Any

from serve_app.engine.sampling_params import SamplingParams
from tests.engine.fake import VOCAB_SIZE, FakeRunner, complete, run, running

Request = tuple[list[int], SamplingParams]


def random_requests(count: int, seed: int) -> list[Request]:
    """Requests with random prompts and random parameters of every kind."""
    rng = random.Random(seed)

    def params() -> SamplingParams:
        return SamplingParams(
            max_tokens=rng.randint(1, 24),
            min_tokens=rng.choice([0, 0, 5]),
            temperature=rng.choice([0, 0.5, 1.0, 1.6]),
            top_p=rng.choice([1.0, 0.9, 0.5]),
            top_k=rng.choice([0, 5, 20]),
            min_p=rng.choice([0.0, 0.1]),
            seed=rng.getrandbits(64),
            presence_penalty=rng.choice([0.0, 1.0]),
            frequency_penalty=rng.choice([0.0, 0.5]),
            repetition_penalty=rng.choice([1.0, 1.2]),
            logit_bias={rng.randrange(VOCAB_SIZE): 3.0} if rng.random() < 0.3 else {},
            stop_token_ids=frozenset(rng.sample(range(VOCAB_SIZE), rng.choice([0, 2]))),
            ignore_eos=rng.random() < 0.5,
            logprobs=rng.choice([None, 0, 4]),
        )

    return [
        ([rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 20))], params())
        for _ in range(count)
    ]


async def one_by_one(engine: Any, requests: list[Request]) -> list[Any]:
    return [await complete(engine, *request) for request in requests]


async def all_at_once(engine: Any, requests: list[Request]) -> list[Any]:
    return await asyncio.gather(*(complete(engine, *request) for request in requests))


def test_every_request_is_exactly_the_same_in_a_batch_of_32() -> None:
    """Tokens, reasons and log probabilities of 32 requests together are those of each alone."""
    requests = random_requests(32, seed=1)
    with running(FakeRunner(), max_num_seqs=32) as engine:
        alone = run(one_by_one(engine, requests))
        assert engine.stats().num_preemptions == 0
        assert run(all_at_once(engine, requests)) == alone


def test_preemptions_change_nothing() -> None:
    """With too few blocks, requests are preempted many times and get the same tokens."""
    requests = [
        (prompt, replace(params, max_tokens=40, ignore_eos=True, stop_token_ids=frozenset()))
        for prompt, params in random_requests(32, seed=2)
    ]
    with running(FakeRunner(), max_num_seqs=32) as engine:
        alone = run(one_by_one(engine, requests))
    with running(FakeRunner(), max_num_seqs=32, num_blocks=40) as engine:
        assert run(all_at_once(engine, requests)) == alone
        assert engine.stats().num_preemptions > 10
        assert engine.stats().num_used_blocks == 0


def test_a_seed_repeats_and_its_absence_does_not() -> None:
    """The same seed gives the same tokens in another batch; without a seed, requests differ."""
    params = SamplingParams(max_tokens=24, temperature=1.5, ignore_eos=True)
    seeded = ([1, 2], replace(params, seed=11))
    other = ([1, 2], replace(params, seed=12))
    unseeded = ([1, 2], params)
    with running(FakeRunner(), max_num_seqs=32) as engine:
        (alone,) = run(all_at_once(engine, [seeded]))
        batch = [*random_requests(10, seed=3), seeded, other, *random_requests(5, seed=4), seeded]
        found = run(all_at_once(engine, batch))
        assert found[10] == found[17] == alone
        assert found[11] != alone
        first, second = run(all_at_once(engine, [unseeded, unseeded]))
        assert first != second
