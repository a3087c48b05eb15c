"""The engine with our Mixtral in float32, beside transformers' `generate` and beside itself."""

from typing import Any

import torch

from serve_app.engine.sampling_params import SamplingParams
from serve_app.errors import InternalError
from tests.engine.fake import complete, run
from tests.engine.mixtral import (
    NUM_TOKENS,
    Pair,
    answers,
    assert_same,
    greedy,
    poisoned,
    prompts,
    serving,
    together,
)


def test_greedy_tokens_are_those_of_transformers_generate(pair: Pair) -> None:
    """32 prompts in one batch, in prefill chunks, give what `generate` gives for each alone."""
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


def test_greedy_tokens_are_the_same_alone_and_in_a_batch(pair: Pair) -> None:
    """A prompt, of 32, gets the same tokens alone and beside 31 sampled requests."""
    some = prompts(32, seed=2)
    with serving(pair.ours) as engine:
        alone = [answers(engine, [prompt], greedy())[0] for prompt in some]
        assert_same(pair, some, alone, answers(engine, some, greedy()))
        sampled = [
            (prompt, SamplingParams(max_tokens=5 + i, temperature=1.5, seed=i, top_p=0.9))
            for i, prompt in enumerate(prompts(31, seed=3))
        ]
        for i in (0, 7, 31):
            mixed = together(engine, [*sampled, (some[i], greedy())])
            assert_same(pair, [some[i]], [alone[i]], [mixed[-1][0]])


def test_greedy_tokens_are_the_same_after_preemptions(pair: Pair) -> None:
    """With too few blocks for all, preempted sequences get the same tokens."""
    some = prompts(32, seed=4, longest=20)
    with serving(pair.ours) as engine:
        undisturbed = answers(engine, some, greedy())
        assert engine.stats().num_preemptions == 0
    with serving(pair.ours, num_blocks=40) as engine:
        disturbed = answers(engine, some, greedy())
        assert engine.stats().num_preemptions >= 5
        assert engine.stats().num_used_blocks == 0
    assert_same(pair, some, undisturbed, disturbed)


def test_a_prompt_of_many_chunks_gives_what_one_chunk_gives(pair: Pair) -> None:
    """200 tokens in steps of 32 beside decoding streams, or in one step, give the same tokens."""
    long = prompts(1, seed=5, longest=1)[0] * 100 + prompts(1, seed=6)[0] * 3
    some = [long[:200], *prompts(7, seed=7)]
    with serving(pair.ours, max_num_batched_tokens=512) as engine:
        whole = answers(engine, some, greedy())
    with serving(pair.ours, max_num_batched_tokens=32) as engine:
        cut = answers(engine, some, greedy())
        assert engine.stats().num_steps > NUM_TOKENS + len(some[0]) // 32
    assert_same(pair, some, whole, cut)


def test_a_seeded_request_repeats_itself_in_any_batch(pair: Pair) -> None:
    """A seeded request gets the same tokens alone, in a batch, and when preempted."""
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
        in_batch = together(engine, requests)
    with serving(pair.ours, num_blocks=40) as engine:
        preempted = together(engine, requests)
        assert engine.stats().num_preemptions >= 5
    # One may part from itself where rounding tips two scores that nearly tie.
    for found in (in_batch, preempted):
        assert sum(a != b for a, b in zip(alone, found, strict=True)) <= 1


def test_numbers_that_are_not_finite_stay_with_their_request(pair: Pair) -> None:
    """A request with NaN fails, and the next owner of its blocks computes finite numbers."""
    poison, asked = 5, [[1], [4, 6, 7]]
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
    with poisoned(pair.ours, poison):
        assert answers() == expected
