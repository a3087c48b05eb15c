"""The decode step for a GPU, its Triton kernels run by the interpreter, beside plain torch."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from serve_app.engine.model_runner import ModelRunner
from serve_app.engine.sampling_params import SamplingParams
from serve_app.engine.scheduled_tokens import ScheduledTokens, mark_launched
from serve_app.engine.sequence import Sequence
from serve_app.model.batch import Batch
from serve_app.model.kernels.cpu.cpu_step import CpuStep
from serve_app.model.kernels.decode_batch import DecodeBatch
from serve_app.model.kernels.triton import (
    nf4_decode,
    nf4_unpack,
    paged_attention,
    prompt_step,
    step_trial,
)
from serve_app.model.kernels.triton.gpu_step import GpuStep
from serve_app.model.kernels.triton.nf4_unpack import Unpacker
from serve_app.model.kernels.unavailable import StepUnavailable
from serve_app.model.kv import KVCache
from serve_app.model.mixtral import Mixtral
from serve_app.model.quantization import Quantization
from serve_app.model.quantized_weight import Codebook
from tools.random_model import config_of, random_model

CPU = torch.device("cpu")
BLOCK_SIZE, NUM_BLOCKS = 16, 32
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "num_local_experts": 3,
}
"""Every 4-bit weight fills tiles of 16 rows by 256 columns."""
CASES: dict[str, tuple[Quantization | None, dict[str, Any]]] = {
    "floats": (None, {}),
    "window, tied": (
        Quantization("fp4", "bfloat16"),
        {"sliding_window": 5, "tie_word_embeddings": True},
    ),
    "odd": (
        Quantization("nf4", "bfloat16"),
        {
            "num_local_experts": 5,
            "num_experts_per_tok": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
        },
    ),
}

PARTS = ((0, 3, 3), (3, 4, 2), (4, 5, 2))
"""Start, end and number of sequences of each step in the runner's test."""


@pytest.fixture(autouse=True)
def _short_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer rows in the trial: the interpreter takes a second for what a GPU does in 1 ms.

    Contexts here are one split of the attention, so that it needs one program; products and
    unpacking take more rows at once, which the interpreter computes in the same time.
    """
    monkeypatch.setattr(nf4_unpack, "ROWS", 256)
    monkeypatch.setattr(nf4_decode, "GATE_UP_ROWS", 512)
    monkeypatch.setattr(nf4_decode, "rows_of", lambda tile: 256)
    monkeypatch.setattr(paged_attention, "NUM_PROGRAMS", 1)
    monkeypatch.setattr(step_trial, "TRIAL_ROWS", 3)
    monkeypatch.setattr(step_trial, "TRIAL_LAYERS", 1)
    monkeypatch.setattr(step_trial, "LONG_CONTEXTS", ())
    monkeypatch.setattr(prompt_step, "TRIAL_CHUNKS", ((3, 20),))
    monkeypatch.setattr(prompt_step, "TRIAL_LAYERS", 1)


def model_of(quantization: Quantization | None, dtype: torch.dtype, **shape: Any) -> Mixtral:
    config = replace(config_of(tiny=True, layers=2), vocab_size=96, **{**SMALL, **shape})
    return random_model(config, quantization, dtype, CPU)


def cache_of(model: Mixtral) -> KVCache:
    dtype = model.embedding.dtype
    return KVCache.allocate(model.config, NUM_BLOCKS, BLOCK_SIZE, dtype, CPU)


@pytest.mark.parametrize(("quantization", "shape"), CASES.values(), ids=CASES)
def test_it_gives_the_models_logits(
    quantization: Quantization | None, shape: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits equal plain torch's to float32's rounding; a padding row changes no other row."""
    monkeypatch.setattr(step_trial, "TRIAL_LAYERS", 2)
    monkeypatch.setattr(step_trial, "TRIAL_ROWS", 5)
    torch.manual_seed(1)
    model = model_of(quantization, torch.float32, **shape)
    cache = cache_of(model)
    (rows,) = step_trial.contexts(model.config, cache)
    assert step_trial.error(model, cache, GpuStep(model, cache, 8).logits, rows) < 1e-5


def test_the_trial_has_long_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has contexts of more tokens than its blocks hold, as far as the model's positions go, and
    plain torch agrees with itself on them; attention that leaves out a token does not."""
    monkeypatch.setattr(step_trial, "LONG_CONTEXTS", (300, 200, 900, 2000))
    model = model_of(None, torch.float32, max_position_embeddings=1000)
    cache = cache_of(model)
    short, long = step_trial.contexts(model.config, cache)
    assert (short, long) == ([1, 18, 35], [300, 200, 900, 1])

    def plain(batch: DecodeBatch, missing: int = 0) -> torch.Tensor:
        lens = (batch.context_lens - missing).clamp(min=1)
        rows = Batch(
            token_ids=batch.token_ids,
            positions=batch.positions,
            slots=batch.slots,
            query_lens=[1] * len(lens),
            context_lens=lens.tolist(),
            block_tables=batch.tables,
            sample_rows=torch.arange(len(lens)),
        )
        logits: torch.Tensor = model(rows, cache)
        return logits

    assert step_trial.error(model, cache, plain, long) < 1e-5
    assert step_trial.error(model, cache, partial(plain, missing=20), long) > 1e-4
    assert not any(page.any() for page in (*cache.keys, *cache.values))


def refusal(model: Mixtral) -> str:
    with pytest.raises(StepUnavailable) as caught:
        GpuStep.verified(model, cache_of(model), 3)
    return str(caught.value)


def test_in_16_bits_it_is_used_when_it_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that computes something else, or raises, is refused with a reason."""
    torch.manual_seed(1)
    model = model_of(Quantization("nf4", "bfloat16"), torch.float16)
    assert isinstance(GpuStep.verified(model, cache_of(model), 3), GpuStep)
    logits = GpuStep.logits
    for wrong in (1.1, float("nan")):
        monkeypatch.setattr(GpuStep, "logits", lambda self, rows, w=wrong: logits(self, rows) * w)
        assert "differs from plain torch" in refusal(model)
    monkeypatch.setattr(GpuStep, "logits", lambda self, rows: rows.nothing)
    assert "failed in its trial (AttributeError" in refusal(model)

    def without_memory(step: GpuStep, rows: DecodeBatch) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(GpuStep, "logits", without_memory)
    with pytest.raises(torch.OutOfMemoryError):  # the load names it; plain torch needs more
        GpuStep.verified(model, cache_of(model), 3)
    odd = model_of(None, torch.float32, head_dim=24)
    assert "power of two" in refusal(odd)


def test_padding_rows_write_nothing() -> None:
    """A batch of fixed size with one live row: its slot alone is written."""
    torch.manual_seed(1)
    model = model_of(Quantization("nf4", "bfloat16"), torch.float32)
    cache = cache_of(model)
    slots = torch.tensor([21, 0, 0])
    lens, tables = torch.tensor([6, 0, 0]).int(), torch.tensor([[1], [0], [0]]).int()
    ids = torch.tensor([7, 0, 0])
    found = GpuStep(model, cache, 3).logits(DecodeBatch(ids, slots * 0 + 5, slots, lens, tables))
    assert found[0].isfinite().all()
    for page in (*cache.keys, *cache.values):
        written = page.view(NUM_BLOCKS * BLOCK_SIZE, -1).any(dim=1).nonzero().flatten()
        assert written.tolist() == [21]


def test_a_runner_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts and decodes by their steps; the same tokens with and without graphs."""
    torch.manual_seed(1)
    model = model_of(Quantization("nf4", "bfloat16"), torch.float32)
    made = (model, NUM_BLOCKS, BLOCK_SIZE, torch.float32, CPU)
    plain = ModelRunner(*made)

    expected = tokens_one_by_one(plain)

    # On a CPU the runner takes the step of Triton kernels in place of the compiled C.
    monkeypatch.setattr(
        CpuStep, "verified", lambda model, cache, _: GpuStep.verified(model, cache, 3)
    )
    fast = ModelRunner(*made, max_num_seqs=3)
    assert "decode steps are CUDA graphs, one for each of 3 batch sizes" in fast.notes
    assert any("attention, routing and products in kernels" in note for note in fast.notes)
    assert "prompts unpack weights by a kernel" in fast.notes
    assert isinstance(model.codebook, Codebook)
    assert isinstance(model.codebook.unpack, Unpacker)

    def tokens(runner: ModelRunner) -> list[list[int]]:
        params = SamplingParams(9, temperature=0)
        some = [Sequence([5, 6, 7 + i], params, i, frozenset()) for i in range(3)]
        for i, sequence in enumerate(some):
            sequence.block_table = [2 * i + 1]
        steps = []
        for start, end, count in PARTS:  # no token is read before the last launch
            scheduled = [ScheduledTokens(s, start, end, True) for s in some[:count]]
            steps.append(runner.launch(scheduled))
            mark_launched(scheduled)
        return [step.wait().token_ids for step in steps]

    assert tokens(fast) == expected
    eager = ModelRunner(*made, max_num_seqs=3, enforce_eager=True)
    assert any("`engine.enforce_eager` is set" in note for note in eager.notes)
    assert eager._graphs is not None
    assert tokens(eager) == expected


def tokens_one_by_one(plain: ModelRunner) -> list[list[int]]:
    """Returns the tokens of the last test, by a runner that waits for each token before the next
    step."""
    params = SamplingParams(9, temperature=0)
    some = [Sequence([5, 6, 7 + i], params, i, frozenset()) for i in range(3)]
    found = []
    for i, sequence in enumerate(some):
        sequence.block_table = [2 * i + 1]
    for start, end, count in PARTS:
        scheduled = [ScheduledTokens(s, start, end, True) for s in some[:count]]
        found.append(plain.launch(scheduled).wait().token_ids)
        for sequence, token in zip(some, found[-1], strict=False):
            sequence.token_ids.append(token)
    return found
