"""Decode steps of fixed batch sizes give the same answers as steps of any size.

Nothing is captured here, because there is no GPU; the same code runs at every step.
"""

import pytest
import torch
from torch import Tensor

from serve_app.engine.decode_graphs import DecodeGraphs
from serve_app.engine.model_runner import ModelRunner
from serve_app.engine.step_sizes import capture_sizes
from serve_app.model.batch import Batch
from serve_app.model.kernels.decode_batch import DecodeBatch
from serve_app.model.kernels.unavailable import StepUnavailable
from tests.engine.mixtral import (
    BLOCK_SIZE,
    Pair,
    answers,
    assert_same,
    greedy,
    prompts,
    serving,
    together,
)
from tests.engine.test_async_scheduling import requests

CPU = torch.device("cpu")


class ModelStep:
    """A decode step by the model in torch; its logits are NaN for padding rows."""

    def __init__(self, runner: ModelRunner) -> None:
        self._model, self._cache = runner.model, runner.cache
        self.sizes: list[int] = []

    def logits(self, rows: DecodeBatch) -> Tensor:
        self.sizes.append(len(rows.token_ids))
        live = (rows.context_lens > 0).nonzero().flatten()
        out = torch.full((len(rows.token_ids), self._model.config.vocab_size), torch.nan)
        if len(live):
            batch = Batch(
                rows.token_ids[live],
                rows.positions[live],
                rows.slots[live],
                [1] * len(live),
                rows.context_lens[live].tolist(),
                rows.tables[live].long(),
                torch.arange(len(live)),
            )
            out[live] = self._model(batch, self._cache)
        return out


class WithGraphs:
    """Gives a runner decode steps of fixed sizes."""

    def __call__(self, runner: ModelRunner) -> None:
        self.step = ModelStep(runner)
        max_blocks = runner.cache.num_blocks
        runner._graphs = DecodeGraphs.captured(self.step, 32, max_blocks, BLOCK_SIZE, CPU)


@pytest.mark.parametrize("can_overlap_steps", [False, True])
def test_every_kind_of_request_gets_the_same(pair: Pair, can_overlap_steps: bool) -> None:
    """Tokens are the same for any parameters, overlapping or not, in batches that shrink."""
    asked, prepared = requests(penalized=True), WithGraphs()
    with serving(pair.ours) as engine:
        expected = [answer[:2] for answer in together(engine, asked)]
    with serving(pair.ours, can_overlap_steps=can_overlap_steps, prepare=prepared) as engine:
        assert [answer[:2] for answer in together(engine, asked)] == expected
    assert len(set(prepared.step.sizes)) > 3


@pytest.mark.parametrize("num_blocks", [512, 60])
def test_blocks_that_come_and_go(pair: Pair, num_blocks: int) -> None:
    """Answers stay the same with block tables that grow, shrink and change owners."""
    some = [prompt * 2 for prompt in prompts(24, seed=2, longest=9)]
    with serving(pair.ours, enable_prefix_caching=False) as engine:
        expected = answers(engine, some, greedy())
    with serving(
        pair.ours, num_blocks=num_blocks, can_overlap_steps=True, prepare=WithGraphs()
    ) as engine:
        found = [answers(engine, some, greedy()) for _ in range(2)]
        assert (engine.stats().num_preemptions > 0) == (num_blocks == 60)
    for answer in found:
        assert_same(pair, some, answer, expected)


def test_without_capture_no_request_is_the_first_of_its_size(pair: Pair) -> None:
    """With `enforce_eager`, the load has computed every batch size, so no kernel is compiled beside
    streams; answers are the same."""
    asked = requests(penalized=False)
    sizes: list[int] = []

    def prepare(runner: ModelRunner) -> None:
        step = ModelStep(runner)
        shape = (32, runner.cache.num_blocks, BLOCK_SIZE)
        runner._graphs = DecodeGraphs.captured(step, *shape, CPU, is_eager=True)
        sizes[:], step.sizes = step.sizes, sizes

    with serving(pair.ours) as engine:
        expected = [answer[:2] for answer in together(engine, asked)]
    with serving(pair.ours, can_overlap_steps=True, prepare=prepare) as engine:
        assert sorted(sizes) == capture_sizes(32)
        sizes.clear()
        assert [answer[:2] for answer in together(engine, asked)] == expected
    assert set(sizes) <= set(capture_sizes(32))
    assert sizes


def test_a_failed_capture_gives_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason is a sentence for `/health`, the traceback is logged, and the engine runs."""

    def fail(graphs: DecodeGraphs) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(DecodeGraphs, "capture", fail)
    reason = r"^capturing it failed \(RuntimeError: operation not permitted"
    with pytest.raises(StepUnavailable, match=reason):
        DecodeGraphs.captured(None, 2, 4, BLOCK_SIZE, CPU)


def test_a_capture_without_memory_fails_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not replaced by launches one by one, which would be slow for as long as it runs."""

    def fail(graphs: DecodeGraphs) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(DecodeGraphs, "capture", fail)
    with pytest.raises(torch.OutOfMemoryError):
        DecodeGraphs.captured(None, 2, 4, BLOCK_SIZE, CPU)


def test_block_tables_whose_copy_failed_are_copied_again() -> None:
    """A copy that fails, for lack of memory, leaves no table behind that counts as copied."""
    graphs = DecodeGraphs(None, 2, 4, BLOCK_SIZE, CPU)  # type: ignore[arg-type]
    tables, whole = torch.tensor([[1, 2], [3, 4]]), graphs._tables
    graphs._tables = whole[:1]
    with pytest.raises(RuntimeError):
        graphs._copy_tables(tables)
    graphs._tables = whole
    graphs._copy_tables(tables)
    assert torch.equal(graphs._tables[:, :2], tables.int())


def test_capture_sizes_reach_the_largest_batch() -> None:
    """The last size holds the largest batch, and small batches have small sizes."""
    assert capture_sizes(1) == [1]
    assert capture_sizes(9) == [1, 2, 4, 8, 16]
    assert capture_sizes(300)[-3:] == [192, 256, 320]
