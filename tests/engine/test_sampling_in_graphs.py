"""Decode steps whose graphs sample, by the GPU's kernel compiled for this machine."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from serve_app.engine.decode_graphs import DecodeGraphs
from serve_app.engine.model_runner import ModelRunner
from serve_app.engine.sampler_trial import verified_sampler
from serve_app.model.kernels.cuda.launcher import Grid
from serve_app.model.kernels.cuda.sampling import SampleKernel
from serve_app.model.kernels.cuda.variants import Card
from serve_app.model.kernels.unavailable import StepUnavailable
from tests.engine.mixtral import BLOCK_SIZE, Pair, serving, together
from tests.engine.test_async_scheduling import requests
from tests.engine.test_decode_graphs import ModelStep
from tests.model.kernels.cuda.emulator import Edit, HostKernel, has_compiler

pytestmark = pytest.mark.skipif(not has_compiler(), reason="g++ compiles the kernel for the host")
CPU = torch.device("cpu")
MAX_ROWS = 32


def sample_kernel(vocab_size: int, edit: Edit | None = None) -> SampleKernel:
    def make(name: str, macros: Sequence[str], grid: Grid) -> HostKernel:
        return HostKernel(name, macros, grid, edit)

    return SampleKernel(vocab_size, MAX_ROWS, Card(90, 1), CPU, make, threads=64, candidates=4)


@pytest.mark.parametrize("can_overlap_steps", [False, True])
def test_every_kind_of_request_gets_the_same(pair: Pair, can_overlap_steps: bool) -> None:
    """Tokens are those of the sampler in torch for any parameters, in batches that change."""
    launches = []

    def prepare(runner: ModelRunner) -> None:
        kernel = sample_kernel(runner.vocab_size)
        sampler = verified_sampler(kernel, runner.vocab_size, CPU)
        launch = sampler.launch

        def counted(logits: Tensor, positions: Tensor, tokens: Tensor) -> None:
            launches.append(len(logits))
            launch(logits, positions, tokens)

        sampler.launch = counted  # type: ignore[method-assign]
        runner.sampler = sampler
        sizes = (MAX_ROWS, runner.cache.num_blocks, BLOCK_SIZE)
        runner._graphs = DecodeGraphs.captured(ModelStep(runner), *sizes, CPU, sampler)

    asked = requests(penalized=True)
    with serving(pair.ours) as engine:
        expected = [answer[:2] for answer in together(engine, asked)]
    with serving(pair.ours, can_overlap_steps=can_overlap_steps, prepare=prepare) as engine:
        assert [answer[:2] for answer in together(engine, asked)] == expected
    assert len(set(launches)) > 3


def test_a_wrong_kernel_is_not_used() -> None:
    """A kernel that takes the worst token in place of the best fails in its trial."""

    def edit(name: str, text: str) -> str:
        changed = text.replace("b.score > a.score", "b.score < a.score")
        assert name != "found.cuh" or changed != text
        return changed

    with pytest.raises(StepUnavailable, match="of 32 tokens differ from plain torch's"):
        verified_sampler(sample_kernel(300, edit), 300, CPU)
