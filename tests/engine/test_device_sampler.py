"""The GPU's sampler, whose kernel runs on the host here, beside the sampler in torch."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from serve_app.engine.device_sampler import DeviceSampler
from serve_app.engine.sampler import Sampler
from serve_app.engine.sampling_params import SamplingParams
from serve_app.engine.sequence import Sequence as EngineSequence
from serve_app.model.kernels.cuda.launcher import Grid
from serve_app.model.kernels.cuda.sampling import SampleKernel
from serve_app.model.kernels.cuda.variants import Card
from serve_app.model.kernels.unavailable import StepUnavailable
from tests.engine.test_sampler import PARAMS, STOP, TOKENS, VOCAB_SIZE
from tests.model.kernels.cuda.emulator import Edit, HostKernel, has_compiler

pytestmark = pytest.mark.skipif(not has_compiler(), reason="g++ compiles the kernel for the host")

CPU, MAX_ROWS, NEAR = torch.device("cpu"), 12, 1e-5
WIDE = 333
"""A vocabulary with several logits a thread, the last ones of some threads alone."""
Make = Callable[..., DeviceSampler]


class Every:
    """A grammar that allows every third token, from `first` on."""

    has_failed, is_complete = False, False

    def __init__(self, first: int) -> None:
        self._first = first

    def start(self) -> "Every":
        return self

    def fill(self, allowed: NDArray[np.int32]) -> None:
        for token in range(self._first, 32 * len(allowed), 3):
            allowed[token // 32] |= np.int32(np.uint32(1 << token % 32))

    def accept(self, token_id: int) -> None: ...

    def allows_only(self, token_ids: Collection[int]) -> bool:
        return False


@pytest.fixture(scope="module")
def make() -> Make:
    """Samplers with the kernel for the host; equal kernels are compiled once."""
    compiled: dict[tuple[object, ...], HostKernel] = {}

    def sampler(vocab_size: int, blocks: int = 1, edit: Edit | None = None) -> DeviceSampler:
        def kernel(name: str, macros: Sequence[str], grid: Grid) -> HostKernel:
            key = (*macros, edit)
            if key not in compiled:
                compiled[key] = HostKernel(name, macros, grid, edit)
            compiled[key]._grid = grid
            return compiled[key]

        made = SampleKernel(
            vocab_size, MAX_ROWS, Card(90, blocks), CPU, kernel, threads=64, candidates=4
        )
        return DeviceSampler(made, vocab_size, CPU)

    return sampler


def fresh(sequence: EngineSequence, **how: Any) -> EngineSequence:
    """Returns the same sequence for another sampler, with changed parameters."""
    params = replace(sequence.params, **how)
    made = EngineSequence(list(sequence.token_ids), params, sequence.seed, sequence.stop_ids)
    made.num_prompt_tokens = sequence.num_prompt_tokens
    return made


def expected(logits: Tensor, sequences: list[EngineSequence], factor: float = 1) -> list[int]:
    """Returns the tokens of the sampler in torch, with `top_p` times `factor`."""
    changed = [
        fresh(s, top_p=s.params.top_p * factor if s.params.top_p < 1 else 1) for s in sequences
    ]
    return Sampler().sample(logits.clone(), changed).wait().token_ids


def assert_equal(found: list[int], logits: Tensor, sequences: list[EngineSequence]) -> None:
    """Tokens are equal; at the edge of top_p, sums that round differently may keep one token more
    or less."""
    if found != (right := expected(logits, sequences)):
        near = [expected(logits, sequences, factor) for factor in (1 - NEAR, 1 + NEAR)]
        for row, token in enumerate(found):
            assert token in {right[row], near[0][row], near[1][row]}


SEQUENCES = st.lists(
    st.builds(
        lambda params, first, prompt, generated, seed: fresh(
            made(params, prompt, generated, seed), grammar=None if first is None else Every(first)
        ),
        PARAMS,
        st.sampled_from([None, None, None, 0, 1, 2]),
        TOKENS.filter(bool),
        TOKENS,
        st.integers(-(2**70), 2**70),
    ),
    min_size=1,
    max_size=8,
)
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "smooth": lambda x: 3 * x,
    "flat": lambda x: 1e-3 * x,
    "ties": lambda x: x.round(),
    "many ties": lambda x: x.clamp(0, 1).round(),
    "steep": lambda x: 1000 * x,
    "all but one": lambda x: torch.where(x == x.amax(-1, keepdim=True), x, -torch.inf),
    "some": lambda x: torch.where(x > 0.5, x, -torch.inf),
    "a NaN": lambda x: torch.where(x == x.amax(-1, keepdim=True), torch.nan, x),
    "an infinity": lambda x: torch.where(x == x.amax(-1, keepdim=True), torch.inf, x),
    "none": lambda x: torch.full_like(x, -torch.inf),
}


def made(
    params: SamplingParams, prompt: list[int], generated: list[int], seed: int
) -> EngineSequence:
    sequence = EngineSequence(list(prompt), params, seed, STOP)
    sequence.token_ids += generated
    return sequence


def random_logits(rows: int, vocab_size: int, seed: int, kinds: list[str]) -> Tensor:
    """Returns float32 `[rows, vocab]`, each row of the next kind."""
    x = torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed))
    return torch.stack([KINDS[kinds[i % len(kinds)]](row) for i, row in enumerate(x)])


@settings(max_examples=60)
@given(
    sequences=SEQUENCES,
    vocab_size=st.sampled_from([VOCAB_SIZE, WIDE]),
    blocks=st.sampled_from([1, 5, 40]),
    seed=st.integers(0, 2**31),
    kinds=st.lists(st.sampled_from(list(KINDS)), min_size=1, max_size=3),
)
def test_tokens_are_those_of_the_sampler_in_torch(
    make: Make,
    sequences: list[EngineSequence],
    vocab_size: int,
    blocks: int,
    seed: int,
    kinds: list[str],
) -> None:
    """For any parameters, kinds of logits and numbers of blocks, and a second token after it, which
    the penalties count; log probabilities are the same, and the logits stay as they are."""
    sampler, theirs = make(vocab_size, blocks), [fresh(s) for s in sequences]
    for step in range(2):
        logits = random_logits(len(sequences), vocab_size, seed + step, kinds)
        found = sampler.sample(logits, sequences).wait()
        assert_equal(found.token_ids, logits, sequences)
        right = Sampler().sample(logits.clone(), theirs).wait()
        assert found.logprobs.keys() == right.logprobs.keys()
        for sequence, other, token in zip(sequences, theirs, found.token_ids, strict=True):
            sequence.token_ids.append(max(token, 0))
            other.token_ids.append(max(token, 0))
            if token < 0:  # the engine ends it
                sequence.sampler_state = other.sampler_state = None
        sequences = [fresh(s) if s.sampler_state is None else s for s in sequences]
        theirs = [fresh(s) if s.sampler_state is None else s for s in theirs]


def battery(sampler: DeviceSampler, blocks: int) -> None:
    """Asserts the tokens of a fixed batch that uses every part of the kernel."""
    how: list[dict[str, Any]] = [
        {"temperature": 0, "min_tokens": 50, "logit_bias": {1: 9.0, 2: 9.0}},
        {"temperature": 0.8, "frequency_penalty": 0.7, "repetition_penalty": 1.3},
        {"temperature": 1.2, "top_k": 2 + blocks % 2},
        {"temperature": 0.9, "top_p": 0.7},
        {"temperature": 1.5, "top_k": 4, "top_p": 0.6, "min_p": 0.01},
        {"temperature": 1.1, "logit_bias": {7: 4.0, 200: 5.0}, "presence_penalty": 1.0},
        {"temperature": 1.0, "grammar": Every(1)},
        {"temperature": 1.4, "min_p": 0.2},
    ]
    params = [SamplingParams(max_tokens=100, **each) for each in how]
    sequences = [made(each, [3, 7, 7], [9, 9], seed) for seed, each in enumerate(params)]
    for step in range(8):
        logits = random_logits(8, WIDE, step, ["smooth", "ties", "flat"])
        if step == 7:
            logits[::2, 40] = torch.nan
        assert_equal(sampler.sample(logits, sequences).wait().token_ids, logits, sequences)
        for sequence in sequences:
            sequence.token_ids.append(7 * step % WIDE)
        sequences = [fresh(sequence) for sequence in sequences]
    few_above_many(sampler)


def few_above_many(sampler: DeviceSampler) -> None:
    """Asserts the tokens for four logits above many equal ones: the search for the third of them
    ends with two above its interval, and top_p counts the three that top_k keeps."""
    logits = torch.full((MAX_ROWS, WIDE), -20.0)
    logits[:, [10, 20, 30, 40]] = torch.tensor([10.0, 9.9, 5.9, 5.85])
    how = [SamplingParams(100, temperature=50, top_k=3, top_p=top_p) for top_p in (1.0, 0.6)]
    for generated in ([], [9]):
        rows = [made(how[row % 2], [3], generated, row) for row in range(MAX_ROWS)]
        assert_equal(sampler.sample(logits, rows).wait().token_ids, logits, rows)


EDITS = {
    "a token's noise": ("mix(key + (u64)id * GOLDEN)", "mix(key + (u64)id)"),
    "equal logits": ("shared->candidates[j] > mine", "shared->candidates[j] >= mine"),
    "the first part": ("int part = 0; part < parts;", "int part = 1; part < parts;"),
    "the bit of a token": (">> id % 32 & 1)", ">> (id + 1) % 32 & 1)"),
    "a logit that is no number": ("*token = id;", "*token = found.token;"),
    "the logits above an interval": ("high = pivot, over_high = sum;", "high = pivot;"),
    "top_k": ("has_top_k ? !p.top_k :", "has_top_k ? true :"),
    "top_k before top_p": ("all.x[i] < lowest ? -INFINITE : all.x[i]", "all.x[i]"),
}


@pytest.mark.parametrize("edit", [None, *EDITS.values()], ids=["nothing", *EDITS])
def test_a_changed_index_is_found(make: Make, edit: tuple[str, str] | None) -> None:
    """A kernel with one index or comparison changed gives other tokens."""

    replaced = 0

    def changed(name: str, text: str) -> str:
        nonlocal replaced
        if edit is None:
            return text
        replaced += text.count(edit[0])
        return text.replace(*edit)

    sampler = make(WIDE, 1, changed)
    assert replaced == (edit is not None)
    try:
        battery(sampler, 1)
        sampler._kernel._blocks = 40
        battery(sampler, 40)
    except (AssertionError, RuntimeError):
        assert edit is not None
    else:
        assert edit is None


def test_the_rough_noise_decides_nothing(make: Make) -> None:
    """Adding an error of up to 0.4 to the kernel's approximate noise, with candidates chosen
    accordingly, changes no token."""

    def edit(name: str, text: str) -> str:
        wrong = text.replace(
            "return -0.69314718f * rough_log2(exponential);",
            "return -0.69314718f * rough_log2(exponential) + (float)(bits % 5) * 0.1f;",
        )
        return wrong.replace("(1e-4f + 1e-6f * fabsf(most))", "0.5f")

    battery(make(WIDE, 1, edit), 1)


def test_the_kernel_counts_what_it_samples(make: Make) -> None:
    """A sequence without counts on the host is penalized for its own tokens."""
    params = SamplingParams(100, temperature=0, frequency_penalty=1.0, presence_penalty=0.5)
    sequence, sampler = made(params, [3], [], 0), make(VOCAB_SIZE, 40)
    logits = torch.randn(1, VOCAB_SIZE)
    for _ in range(20):
        (right,) = expected(logits, [sequence])
        assert sampler.sample(logits, [sequence]).wait().token_ids == [right]
        sequence.token_ids.append(right)
    counts = np.bincount(sequence.token_ids[1:], minlength=VOCAB_SIZE)
    counts[3] -= 1 << 31
    assert sequence.sampler_state.tolist() == counts.tolist()


def test_the_size_of_mixtral() -> None:
    """32,000 tokens in the registers of 1,024 threads, and in parts."""
    kernels: list[HostKernel] = []

    def kernel(name: str, macros: Sequence[str], grid: Grid) -> HostKernel:
        kernels.append(HostKernel(name, macros, grid))
        return kernels[0]

    sampler = DeviceSampler(SampleKernel(32_000, 2, Card(90, 3), CPU, kernel), 32_000, CPU)
    logits = random_logits(2, 32_000, 0, ["smooth"])
    for how in ({"top_p": 0.9, "top_k": 500}, {"temperature": 0.7}):
        params = SamplingParams(9, **how)  # type: ignore[arg-type]
        for rows in ((0,), (0, 1)):
            some = [made(params, [3], [], seed) for seed in rows]
            found = sampler.sample(logits[list(rows)], some).wait().token_ids
            assert_equal(found, logits[list(rows)], some)


def test_a_larger_vocabulary_is_refused() -> None:
    """It does not fit the registers of a block."""
    with pytest.raises(StepUnavailable, match="more than 32768 tokens"):
        SampleKernel(32_769, 1, Card(90, 1), CPU, lambda *_: pytest.fail("compiled"))
