"""A step on a GPU never waits for it: the code of a step runs on a GPU that computes nothing."""

from collections import Counter
from collections.abc import Callable, Collection

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from serve_app.engine.decode_graphs import DecodeGraphs
from serve_app.engine.device_sampler import DeviceSampler
from serve_app.engine.model_runner import ModelRunner
from serve_app.engine.sampler import Sampler
from serve_app.engine.sampling_params import SamplingParams
from serve_app.engine.scheduled_tokens import ScheduledTokens, mark_launched
from serve_app.engine.sequence import Sequence
from serve_app.engine.transfer import to_host
from serve_app.model.kernels.cuda.prompt_passes import PassedProducts
from serve_app.model.kernels.cuda.sampling import SampleKernel
from serve_app.model.kernels.cuda.step_kernels import StepKernels
from serve_app.model.kernels.cuda.use_kernels import products_of
from serve_app.model.kernels.cuda.variants import Card
from serve_app.model.kernels.triton.gpu_step import GpuStep
from serve_app.model.kernels.triton.prompt_products import UnpackedProducts
from serve_app.model.kernels.triton.prompt_step import PromptStep
from serve_app.model.mixtral import Mixtral
from serve_app.model.quantization import Quantization
from tests.engine.fake_gpu import GPU, FakeGpu, Recorded, Waits, gpu
from tools.random_model import config_of

__all__ = ["gpu"]
LAYERS, BLOCK_SIZE = 2, 16


def runner_of(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, *, in_torch: bool) -> ModelRunner:
    """A runner as `ModelRunner` makes it on an H200, without its trials, which need values."""
    card, config = Card(90, 132), config_of(tiny=False, layers=LAYERS)

    def make(name: str, *_: object) -> Recorded:
        return Recorded(gpu, name)

    monkeypatch.setattr(ModelRunner, "_choose_step", lambda *_: None)
    with GPU:
        model = Mixtral(config, Quantization("nf4", "bfloat16")).to(torch.bfloat16)
    monkeypatch.setattr("serve_app.model.kernels.cuda.products.pairs_of", torch.zeros_like)
    products = model.products = products_of(config, card, torch.zeros(16), make)
    products.step_kernels = StepKernels(config, card, make)
    runner = ModelRunner(model, 64, BLOCK_SIZE, torch.bfloat16, GPU, max_num_seqs=4)
    step = runner._gpu_step = GpuStep(model, runner.cache, 4, in_cuda=True)
    kernel = SampleKernel(config.vocab_size, 4, card, GPU, make)
    sampler = None if in_torch else DeviceSampler(kernel, config.vocab_size, GPU)
    runner.sampler = sampler or Sampler()
    graphs = runner._graphs = DecodeGraphs(step, 4, 64, BLOCK_SIZE, GPU, sampler)
    graphs._replays = {size: graphs._computation(size) for size in graphs.sizes}
    prompts = runner._prompt_step = PromptStep(model, runner.cache)
    prompts._products = UnpackedProducts(model, 8)
    prompts._few, prompts.few_tokens = PassedProducts(model, products), 64
    return runner


class Every:
    """A grammar that allows every token."""

    has_failed, is_complete = False, False

    def start(self) -> "Every":
        return self

    def fill(self, allowed: NDArray[np.int32]) -> None:
        allowed[:] = -1

    def accept(self, token_id: int) -> None: ...

    def allows_only(self, token_ids: Collection[int]) -> bool:
        return False


PARAMS = {
    "greedy": SamplingParams(9, temperature=0),
    "random": SamplingParams(9, temperature=0.7),
    "filtered": SamplingParams(9, temperature=0.7, top_k=5, top_p=0.9, min_p=0.1),
    "penalties": SamplingParams(9, frequency_penalty=1.0, repetition_penalty=1.1),
    "bias": SamplingParams(9, logit_bias={3: 5.0}, min_tokens=4),
    "logprobs": SamplingParams(9, logprobs=3),
    "a grammar": SamplingParams(9, grammar=Every()),
    "prompt logprobs": SamplingParams(9, prompt_logprobs=2),
}


def sequences(params: SamplingParams, length: int) -> list[Sequence]:
    """Two sequences with the blocks of 200 tokens each."""
    made = [Sequence(list(range(length)), params, i, frozenset({1, 2})) for i in range(2)]
    for i, sequence in enumerate(made):
        sequence.block_table = list(range(13 * i, 13 * i + 13))
    return made


def launch(runner: ModelRunner, batch: list[Sequence], start: int) -> None:
    """Launches the step of all tokens from `start` on. As in the engine, the host knows the tokens
    of a sequence with penalties or a grammar, and no others."""
    for sequence in batch:
        if sequence.needs_last_token:
            sequence.token_ids[:] = [max(token, 0) for token in sequence.token_ids]
    scheduled = [ScheduledTokens(s, start, len(s.token_ids), True) for s in batch]
    runner.launch(scheduled)
    mark_launched(scheduled)


@pytest.mark.parametrize("in_torch", [False, True], ids=["kernel", "torch"])
@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_no_step_waits(
    params: SamplingParams, in_torch: bool, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of many and of few tokens, decodes whose tokens are not known yet and clearing blocks
    need no value on the host, and copy from pinned memory, for any parameters and either
    sampler."""
    with gpu:
        runner = runner_of(gpu, monkeypatch, in_torch=in_torch)
        for length in (100, 20):
            batch = sequences(params, length)
            launch(runner, batch, 0)
            for position in range(length, length + 2):
                launch(runner, batch, position)
            launch(runner, batch[1:], length + 2)
            runner.clear_blocks([3, 4])


def test_clearing_blocks_is_two_launches(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys and values of all layers are cleared by one kernel, after one copy of the blocks'
    numbers and one addition."""
    with gpu:
        runner = runner_of(gpu, monkeypatch, in_torch=False)
        gpu.launches.clear()
        gpu.copies.clear()
        runner.clear_blocks([3, 4])
    assert gpu.launches == {"aten.add": 1, "aten.index_fill_": 1}
    assert gpu.copies == {"in": 1}


def test_a_decode_step_is_few_launches(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first one, a sampled step of the same sequences copies its inputs to the device,
    reads its tokens, and launches eight kernels a layer, one for sampling, and few of torch."""
    with gpu:
        runner = runner_of(gpu, monkeypatch, in_torch=False)
        batch = sequences(SamplingParams(9, temperature=0.7, top_p=0.9), 20)
        launch(runner, batch, 0)
        for position in (20, 21):
            gpu.launches.clear()
            gpu.copies.clear()
            launch(runner, batch, position)
    kernels = {"few_tokens": 4, "rope": 1, "attention": 1, "add_norm": 2}
    step = Counter({name: LAYERS * count for name, count in kernels.items()})
    step += Counter({"add_norm": 1, "sample": 1})
    others = gpu.launches - step
    assert gpu.launches - others == step
    assert others.total() <= 12, others
    assert gpu.copies == {"in": 2, "out": 1}


WAITING: dict[str, Callable[[Tensor], object]] = {
    "a number": lambda x: x[0].item(),
    "a list": lambda x: x.tolist(),
    "a tensor from a list": lambda x: torch.tensor([1, 2], device=x.device),
    "an index from a list": lambda x: x[[0, 1]],
    "a mask as index": lambda x: x[x > 0],
    "places": lambda x: x.nonzero(),
    "a copy to the host": lambda x: x.cpu(),
    "a copy from memory that is not pinned": lambda x: x.copy_(torch.zeros(4), non_blocking=True),
    "a copy that is not asynchronous": lambda x: x.copy_(torch.zeros(4).pin_memory()),
    "a condition": lambda x: bool((x > 0).all()),
}


@pytest.mark.parametrize("wait", WAITING.values(), ids=WAITING)
def test_what_waits_is_found(wait: Callable[[Tensor], object], gpu: FakeGpu) -> None:
    """The fake GPU refuses each operation for which torch waits on a real one."""
    with gpu:
        x = torch.zeros(4, device=GPU)
        to_host(x).copy_(x, non_blocking=True)
        with pytest.raises((Waits, RuntimeError)):
            wait(x)
