"""The compiled step against transformers, plain torch and itself in other batches."""

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from serve_app.engine.model_runner import ModelRunner
from serve_app.engine.sampling_params import SamplingParams
from serve_app.engine.scheduled_tokens import ScheduledTokens
from serve_app.engine.sequence import Sequence
from serve_app.model.batch import Batch
from serve_app.model.kernels.cpu.cpu_step import CpuStep
from serve_app.model.kernels.unavailable import StepUnavailable
from serve_app.model.kv import KVCache
from serve_app.model.mixtral import Mixtral
from serve_app.model.quantization import Quantization
from tests.model.driver import load_float32, oracle_logits, random_ids, random_oracle

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="it needs a C compiler")

SIZES = {"hidden_size": 64, "intermediate_size": 48, "head_dim": 16, "num_attention_heads": 4}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"sliding_window": 21},
    "wide window": {"sliding_window": 70},
    "odd": {
        "hidden_size": 80,
        "head_dim": 32,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "num_local_experts": 5,
        "num_experts_per_tok": 3,
        "num_hidden_layers": 3,
        "vocab_size": 101,
        "tie_word_embeddings": True,
    },
    "many experts": {"num_local_experts": 17, "num_experts_per_tok": 1, "num_key_value_heads": 4},
}
BLOCK_SIZE = 4
NUM_BLOCKS = 1280


def model_of(folder: Path, **shape: Any) -> tuple[Mixtral, Any]:
    oracle = random_oracle(**{**SIZES, **shape})
    oracle.save_pretrained(folder)
    return load_float32(folder), oracle


def cache_of(model: Mixtral) -> KVCache:
    cpu = torch.device("cpu")
    return KVCache.allocate(model.config, NUM_BLOCKS, BLOCK_SIZE, torch.float32, cpu)


def step_of(model: Mixtral, cache: KVCache, max_threads: int = 1) -> CpuStep:
    return CpuStep.verified(model, cache, max_threads)


def decodes(contexts: list[int], seed: int = 0) -> Batch:
    """Decodes: one new token for each sequence, at the end of contexts of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    width = -(-max(contexts) // BLOCK_SIZE)
    tables = torch.randperm(NUM_BLOCKS, generator=generator)[: len(contexts) * width]
    tables = tables.view(len(contexts), width)
    last = torch.tensor(contexts) - 1
    slots = tables.gather(1, (last // BLOCK_SIZE)[:, None])[:, 0] * BLOCK_SIZE + last % BLOCK_SIZE
    return Batch(
        token_ids=torch.randint(0, 90, (len(contexts),), generator=generator),
        positions=last,
        slots=slots,
        query_lens=[1] * len(contexts),
        context_lens=contexts,
        block_tables=tables,
        sample_rows=torch.arange(len(contexts)),
    )


def row(batch: Batch, i: int) -> Batch:
    """Returns the batch with its row `i` alone."""
    only = slice(i, i + 1)
    return Batch(
        batch.token_ids[only],
        batch.positions[only],
        batch.slots[only],
        [1],
        batch.context_lens[only],
        batch.block_tables[only],
        torch.zeros(1, dtype=torch.int64),
    )


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_row_has_the_same_bits_in_any_batch(shape: dict[str, Any], tmp_path: Path) -> None:
    """Beside 0 to 32 other decodes a row gets the bits that it gets alone, near torch's."""
    model, _ = model_of(tmp_path, **shape)
    cache = cache_of(model)
    step = step_of(model, cache)
    generator = torch.Generator().manual_seed(2)
    for pages in (*cache.keys, *cache.values):
        pages.copy_(torch.randn(pages.shape, generator=generator))
    # Keys and values are read in segments of 64.
    contexts = [63, 64, 65, 90, 127, 128, 129, 130]
    contexts += torch.randint(1, 50, (25,), generator=generator).tolist()
    whole = decodes(contexts)
    alone = torch.cat([step.logits(row(whole, i)) for i in range(len(contexts))])
    assert torch.equal(step.logits(whole), alone)
    torch.testing.assert_close(model(whole, cache), alone, rtol=0, atol=1e-3)
    for count in (2, 3, 5, 8, 13, 31):
        assert torch.equal(step.logits(decodes(contexts)), alone)
        few = decodes(contexts)
        few.query_lens, few.context_lens = few.query_lens[:count], contexts[:count]
        few.sample_rows = few.sample_rows[:count]
        assert torch.equal(step.logits(few), alone[:count])


def piece(ids: list[int], start: int, end: int, table: torch.Tensor) -> Batch:
    """Returns the tokens `start` to `end` of a prompt."""
    positions = torch.arange(start, end)
    slots = table[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    some = torch.tensor(ids[start:end])
    return Batch(some, positions, slots, [end - start], [end], table[None], positions - start)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_prompt_has_the_same_bits_in_any_pieces(shape: dict[str, Any], tmp_path: Path) -> None:
    """A prompt token by token, at once, or cut anywhere gives the oracle's logits."""
    model, oracle = model_of(tmp_path, **shape)
    step = step_of(model, cache_of(model))
    ids = random_ids(141)
    table = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(1))[:36]
    whole = step.logits(piece(ids, 0, 141, table))
    torch.testing.assert_close(whole, oracle_logits(oracle, ids), rtol=0, atol=1e-4)
    small = (0, 1, 5, 11, 28, 33, 50, 59, 66, 75, 92, 126, 129, 138, 141)
    for cuts in (range(142), small, (0, 64, 141), (0, 63, 128, 141)):
        parts = [step.logits(piece(ids, *ends, table)) for ends in pairwise(cuts)]
        assert torch.equal(torch.cat(parts), whole)


def test_decodes_and_prompts_of_one_step_get_their_own_logits(tmp_path: Path) -> None:
    """Prefill chunks in any order, some without sampled rows, give the logits of plain torch."""
    model, _ = model_of(tmp_path)

    def tokens(is_compiled: bool) -> list[int]:
        cpu = torch.device("cpu")
        runner = ModelRunner(model, NUM_BLOCKS, BLOCK_SIZE, torch.float32, cpu)
        assert "one call" in runner.notes[0]
        if not is_compiled:
            runner._cpu_step = None
        params = SamplingParams(8, temperature=0)
        some = [Sequence(random_ids(20, seed=i), params, 0, frozenset()) for i in range(7)]
        for i, sequence in enumerate(some):
            sequence.block_table = list(range(10 * i, 10 * i + 5))
        runner.launch([ScheduledTokens(s, 0, 19, False) for s in some])
        ends = [(19, 20, True), (18, 20, True), (18, 19, False), (19, 20, True), (4, 9, False)]
        ends += [(10, 20, True), (19, 20, True)]
        chunks = [ScheduledTokens(s, *end) for s, end in zip(some, ends, strict=True)]
        steps = (runner.launch(chunks), runner.launch([chunks[2]]))
        return [token for step in steps for token in step.wait().token_ids]

    assert len(set(tokens(True))) > 2
    assert tokens(True) == tokens(False)


def test_numbers_that_are_not_finite_stay_so(tmp_path: Path) -> None:
    """A NaN in the keys, values or embedding of one row reaches its logits and no others."""
    model, _ = model_of(tmp_path)
    cache = cache_of(model)
    step = step_of(model, cache)
    for spoilt in (cache.keys[0], cache.values[1]):
        batch = decodes([9, 9])
        assert step.logits(batch).isfinite().all()
        spoilt[batch.block_tables[1, 1], 2] = torch.nan
        found = step.logits(batch)
        assert found[0].isfinite().all()
        assert found[1].isnan().all()
        cache.clear(torch.arange(NUM_BLOCKS))


def test_a_token_that_is_not_finite_spoils_what_follows_it_alone(tmp_path: Path) -> None:
    """A NaN within a prefill chunk does not reach the tokens before it."""
    model, _ = model_of(tmp_path)
    step = step_of(model, cache_of(model))
    ids = [id_ + (id_ == 7) for id_ in random_ids(80)]
    ids[70] = 7
    model.embedding[7] = torch.nan
    found = step.logits(piece(ids, 0, 80, torch.arange(20)))
    assert found[:70].isfinite().all()
    assert found[70:].isnan().all()


def refusal(model: Mixtral) -> str:
    with pytest.raises(StepUnavailable) as caught:
        step_of(model, cache_of(model))
    return str(caught.value)


def test_it_says_why_it_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that do not fit, 4 bits, another dtype, and a library that computes something else."""
    odd, _ = model_of(tmp_path / "odd", head_dim=8)
    assert "multiples of 16" in refusal(odd)
    model, _ = model_of(tmp_path / "fits", intermediate_size=64)
    quantized = load_float32(tmp_path / "fits", Quantization("nf4", "bfloat16"))
    assert "4-bit weights" in refusal(quantized)
    assert "float32" in refusal(load_float32(tmp_path / "fits").bfloat16())
    logits = CpuStep.logits
    for wrong in (1.001, float("nan")):
        monkeypatch.setattr(CpuStep, "logits", lambda *inputs, w=wrong: logits(*inputs) * w)
        assert "differs from plain torch" in refusal(model)
