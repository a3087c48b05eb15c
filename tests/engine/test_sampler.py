"""The sampler, beside transformers' logits processors and beside one row at a time."""

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from serve_app.engine.noise import as_int64, gumbel
from serve_app.engine.runner import SampledTokens
from serve_app.engine.sampler import Sampler
from serve_app.engine.sampling_params import SamplingParams
from serve_app.engine.sequence import FAILED, Sequence
from tests.engine.fake import Logprob

VOCAB_SIZE = 60
STOP = frozenset({1, 2})


def sampled(sampler: Sampler, logits: Tensor, sequences: list[Sequence]) -> SampledTokens:
    """Returns the sampled tokens on the host."""
    return sampler.sample(logits, sequences).wait()


def new_sequence(
    params: SamplingParams, prompt: list[int], generated: list[int], seed: int = 0
) -> Sequence:
    sequence = Sequence(list(prompt), params, seed, STOP)
    sequence.token_ids += generated
    return sequence


def reference_scores(logits: Tensor, sequence: Sequence) -> Any:
    """Returns the scores `[vocab]` whose softmax a token is drawn from, by transformers'
    processors."""
    from transformers.generation import logits_process as hf

    params = sequence.params
    scores = logits.clone()
    for token_id, bias in params.logit_bias.items():
        scores[token_id] += bias
    ids = torch.tensor([sequence.token_ids])
    scores = hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, scores[None])[0]
    for token_id, count in Counter(sequence.token_ids[sequence.num_prompt_tokens :]).items():
        scores[token_id] -= count * params.frequency_penalty + params.presence_penalty
    if sequence.num_output_tokens < params.min_tokens:
        scores[list(sequence.stop_ids)] = -torch.inf
    if params.temperature == 0:
        return scores.masked_fill(scores < scores.max(), -torch.inf)
    warpers: list[Any] = [hf.TemperatureLogitsWarper(float(params.temperature))]
    if params.top_k:
        warpers.append(hf.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(hf.TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(hf.MinPLogitsWarper(params.min_p))
    for warper in warpers:
        scores = warper(ids, scores[None])[0]
    return scores


def reference_token(logits: Tensor, sequence: Sequence) -> tuple[int, float]:
    """Returns the token that the noise picks, and its lead over the second best."""
    scores = reference_scores(logits, sequence).double()
    position = torch.tensor([sequence.num_output_tokens])
    scores += gumbel(torch.tensor([as_int64(sequence.seed)]), position, len(scores))[0]
    best = scores.topk(2)
    return int(best.indices[0]), float(best.values[0] - best.values[1])


PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.just(100),
    min_tokens=st.sampled_from([0, 0, 3, 50]),
    temperature=st.sampled_from([0, 0.3, 0.7, 1, 1.0, 2.0]),
    top_p=st.sampled_from([1.0, 1.0, 0.95, 0.6, 0.1, 1e-4]),
    top_k=st.sampled_from([0, 0, 1, 5, 59, 60, 1000]),
    min_p=st.sampled_from([0.0, 0.0, 0.02, 0.3, 1.0]),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.5, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.7, -0.4]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.8]),
    logit_bias=st.dictionaries(st.integers(0, VOCAB_SIZE - 1), st.sampled_from([-100.0, -1, 5])),
    logprobs=st.sampled_from([None, None, 0, 3, 200]),
)
TOKENS = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=12)
SEQUENCES = st.lists(
    st.builds(new_sequence, PARAMS, TOKENS.filter(bool), TOKENS, seed=st.integers(-(2**70), 2**70)),
    min_size=1,
    max_size=8,
)


@settings(max_examples=250)
@given(SEQUENCES, st.integers(0, 2**31))
def test_every_row_gets_what_transformers_processors_and_the_noise_give(
    sequences: list[Sequence], logits_seed: int
) -> None:
    """For any mix of parameters in a batch, each row's token is the reference's of that row."""
    logits = torch.randn(
        len(sequences), VOCAB_SIZE, generator=torch.Generator().manual_seed(logits_seed)
    )
    samples = sampled(Sampler(), logits.clone(), sequences)
    for row, sequence in enumerate(sequences):
        token, lead = reference_token(logits[row], sequence)
        # A margin for the order of float32 operations, which may tip scales that nearly balance.
        if lead > 1e-4:
            assert samples.token_ids[row] == token


@settings(max_examples=100)
@given(SEQUENCES, st.integers(0, 2**31), st.integers(1, 7))
def test_a_row_is_exactly_the_same_alone_and_in_a_batch(
    sequences: list[Sequence], logits_seed: int, num_rows: int
) -> None:
    """Tokens and log probabilities of a batch are bit for bit those of each row alone."""
    logits = torch.randn(
        len(sequences), VOCAB_SIZE, generator=torch.Generator().manual_seed(logits_seed)
    )
    together = sampled(Sampler(), logits.clone(), sequences)
    for row, sequence in enumerate(sequences):
        sequence.sampler_state = None
        alone = sampled(Sampler(), logits[row : row + 1].clone(), [sequence])
        assert alone.token_ids == together.token_ids[row : row + 1]
        one, other = alone.logprobs.get(0), together.logprobs.get(row)
        assert (one and Logprob.of(one)) == (other and Logprob.of(other))


def test_counts_follow_a_sequence_through_changing_batches() -> None:
    """After joining, leaving and rejoining batches, penalties equal those counted from nothing."""
    rng = random.Random(5)
    params = SamplingParams(
        max_tokens=100, temperature=1.0, frequency_penalty=0.9, repetition_penalty=1.2
    )
    sequences = [new_sequence(params, [i, i + 1], [], seed=i) for i in range(6)]
    sampler = Sampler()
    for step in range(60):
        batch = sequences if step % 4 else rng.sample(sequences, rng.randint(1, 6))
        logits = torch.randn(len(batch), VOCAB_SIZE) * 0.3
        fresh = [new_sequence(params, s.token_ids[:2], s.token_ids[2:], seed=s.seed) for s in batch]
        expected = sampled(Sampler(), logits.clone(), fresh).token_ids
        assert sampled(sampler, logits, list(batch)).token_ids == expected
        for sequence, token in zip(batch, expected, strict=True):
            sequence.token_ids.append(token)
    assert max(sequence.num_output_tokens for sequence in sequences) > 45


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.7, "top_k": 12},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 1.4, "top_k": 30, "top_p": 0.9, "min_p": 0.05},
        {"repetition_penalty": 1.5, "presence_penalty": 0.5},
    ],
    ids=str,
)
def test_tokens_are_distributed_as_the_softmax_of_the_scores(how: dict[str, Any]) -> None:
    """Chi-square over 20,000 seeds and positions: the distribution is the reference's."""
    num_draws = 20_000
    logits = torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(3)) * 1.5
    params = SamplingParams(max_tokens=100, **how)
    sequences = [
        new_sequence(params, [5, 6], [7, 8, 8][: i % 4], seed=i // 4) for i in range(num_draws)
    ]
    sampler = Sampler()
    for num_output_tokens in range(4):
        some = sequences[num_output_tokens::4]
        tokens = sampled(sampler, logits.repeat(len(some), 1), some).token_ids
        probs = reference_scores(logits, some[0]).double().softmax(-1).numpy()
        counts = np.bincount(tokens, minlength=VOCAB_SIZE)
        assert counts[probs == 0].sum() == 0
        assert chi_square(counts, probs * len(some)) < 3.3, num_output_tokens


def chi_square(observed: Any, expected: Any) -> float:
    """Pearson's statistic as standard deviations above its mean (Wilson and Hilferty)."""
    rare = expected < 5
    observed = np.append(observed[~rare], observed[rare].sum())
    expected = np.append(expected[~rare], max(expected[rare].sum(), 1e-9))
    keep = expected >= 5
    statistic = ((observed[keep] - expected[keep]) ** 2 / expected[keep]).sum()
    freedom = max(keep.sum() - 1, 1)
    spread = 2 / (9 * freedom)
    return float(((statistic / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5)


def test_logprobs_are_those_of_the_models_own_distribution() -> None:
    """Logprobs are taken before bias, penalties and temperature; best first, equal ones by id."""
    logits = torch.randn(2, VOCAB_SIZE)
    logits[0, [11, 7, 30]] = 6.0
    expected = logits.double().log_softmax(-1)
    params = SamplingParams(
        max_tokens=9, temperature=0, logit_bias={20: 100.0}, repetition_penalty=2.0, logprobs=4
    )
    silent = SamplingParams(max_tokens=9, temperature=0)
    sequences = [new_sequence(params, [7], [7]), new_sequence(silent, [7], [7])]
    samples = sampled(Sampler(), logits.clone(), sequences)
    assert list(samples.logprobs) == [0]
    found = samples.logprobs[0]
    assert found.token_id == samples.token_ids[0] == 20
    assert found.logprob == pytest.approx(expected[0, 20].item(), abs=1e-5)
    assert found.top_ids.tolist()[:3] == [7, 11, 30]
    assert found.top_logprobs.tolist() == pytest.approx(
        expected[0].topk(4).values.tolist(), abs=1e-5
    )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_fails_alone(bad: float) -> None:
    """A row that is not finite gets FAILED; the tokens of the other rows do not change."""
    params = [
        SamplingParams(max_tokens=9, **how)
        for how in ({"temperature": 0}, {"top_p": 0.9}, {"frequency_penalty": 1.0}, {"logprobs": 2})
    ]
    sequences = [new_sequence(p, [1], [4], seed=i) for i, p in enumerate(params)]
    logits = torch.randn(4, VOCAB_SIZE)
    sound = sampled(Sampler(), logits.clone(), sequences).token_ids
    for row in range(4):
        broken = logits.clone()
        if bad == -torch.inf:
            broken[row] = bad
        else:
            broken[row, 9] = bad
        expected = [FAILED if i == row else token for i, token in enumerate(sound)]
        assert sampled(Sampler(), broken, sequences).token_ids == expected


def test_greedy_takes_the_first_of_equals() -> None:
    """Ties go to the lowest id, in any batch."""
    logits = torch.zeros(3, VOCAB_SIZE)
    sequences = [new_sequence(SamplingParams(9, temperature=0), [4], []) for _ in range(3)]
    assert sampled(Sampler(), logits, sequences).token_ids == [0, 0, 0]
