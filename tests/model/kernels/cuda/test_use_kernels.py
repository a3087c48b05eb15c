"""A model whose 4-bit products run in CUDA kernels: here their sources, run on the host."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from serve_app.model.batch import Batch
from serve_app.model.kernels import attention_check
from serve_app.model.kernels.cuda import use_kernels
from serve_app.model.kernels.cuda.launchable import MakeKernel
from serve_app.model.kernels.cuda.launcher import Grid
from serve_app.model.kernels.cuda.layer_products import TileUnpacker
from serve_app.model.kernels.cuda.products import CudaProducts, TiledWeight
from serve_app.model.kernels.cuda.prompt_passes import PassedProducts
from serve_app.model.kernels.cuda.use_kernels import (
    model_problem,
    sizes_of,
    try_kernels,
    use_cuda_kernels,
)
from serve_app.model.kernels.cuda.variants import BATCHES, GATE_UP, Card, batch_of
from serve_app.model.kernels.decode_batch import DecodeBatch
from serve_app.model.kernels.triton import paged_attention, step_trial
from serve_app.model.kernels.triton.gpu_step import GpuStep
from serve_app.model.kernels.triton.prompt_products import TorchProducts
from serve_app.model.kernels.unavailable import StepUnavailable
from serve_app.model.kv import KVCache
from serve_app.model.mixtral import Mixtral
from serve_app.model.quantization import Quantization
from tests.model.kernels.cuda.emulator import HostKernel, has_compiler
from tests.model.kernels.cuda.host_kernels import HostKernels
from tools.random_model import config_of, random_model

CARD, CPU = Card(90, 1), torch.device("cpu")
SMALLEST = {
    "hidden_size": 2048,
    "intermediate_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "num_local_experts": 3,
    "vocab_size": 96,
}
"""The smallest model that fits the kernels, but for its vocabulary."""
TRIAL_TOKENS = use_kernels.TRIAL_TOKENS
NF4 = Quantization("nf4", "bfloat16")


def model_of(
    quantization: Quantization | None = NF4,
    dtype: torch.dtype = torch.bfloat16,
    quantize_lm_head: bool = False,
    **shape: Any,
) -> Mixtral:
    config = replace(config_of(tiny=True, layers=1), **{**SMALLEST, **shape})
    return random_model(config, quantization, dtype, CPU, quantize_lm_head=quantize_lm_head)


def logits(model: Mixtral) -> torch.Tensor:
    """Returns the logits of a prompt of three tokens in plain torch."""
    numbers = torch.arange(3)
    batch = Batch(numbers, numbers, numbers, [3], [3], torch.zeros(1, 1).long(), numbers[-1:])
    found: torch.Tensor = model(batch, KVCache.allocate(model.config, 1, 16, torch.bfloat16, CPU))
    return found


def cache_of(model: Mixtral) -> KVCache:
    return KVCache.allocate(model.config, 4, 16, model.embedding.dtype, CPU)


class Nothing:
    """A kernel that computes nothing."""

    def __init__(self, name: str, macros: Sequence[str], grid: Grid) -> None: ...

    def launch(self, *arguments: object, blocks: int | None = None) -> None: ...


@pytest.fixture
def make() -> MakeKernel:
    """Kernels that are compiled for the host when they are launched; the trial has few tokens."""
    if not has_compiler():
        pytest.skip("g++ compiles the kernels for the host")

    class Later:
        def __init__(self, *how: Any) -> None:
            self._how = how
            self._kernel: HostKernel | None = None

        def launch(self, *arguments: Any, blocks: int | None = None) -> None:
            if self._kernel is None:
                self._kernel = HostKernel(*self._how)
            self._kernel.launch(*arguments, blocks=blocks)

    return Later


@pytest.fixture(autouse=True)
def _short_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(use_kernels, "TRIAL_TOKENS", (5,))
    monkeypatch.setattr(paged_attention, "NUM_PROGRAMS", 1)
    monkeypatch.setattr(step_trial, "TRIAL_ROWS", 2)
    monkeypatch.setattr(step_trial, "LONG_CONTEXTS", ())
    monkeypatch.setattr(attention_check, "CONTEXTS", (1, 150))


def test_a_model_with_them_gives_the_same_logits(make: MakeKernel) -> None:
    """They agree with plain torch, which reads the same weights; so does the kernel that unpacks
    weights for prompts, to the rounding, and so do the products of few prompt tokens."""
    model = model_of()
    expected = logits(model)
    assert 1e-5 < try_kernels(model, CARD, make) < 2e-2
    assert torch.equal(logits(model), expected)
    assert model.codebook is not None
    assert model.products is not None
    few, plain = PassedProducts(model, model.products), TorchProducts(model)
    x = torch.randn(5, 2048, generator=torch.Generator().manual_seed(1)).bfloat16()
    for found, other in (
        (few.mlp(0, x).view(5, 2, -1).sum(1), plain.mlp(0, x)[0]),
        (few.qkv(0, x), plain.qkv(0, x)),
        (few.o(0, x), plain.o(0, x)),
    ):
        assert 1e-5 < (found - other).norm() / other.norm() < 2e-2
    model.codebook.unpack = TileUnpacker(model.products)
    assert 0 < (logits(model) - expected).norm() / expected.norm() < 2e-2


def test_all_layers_run_in_them(make: MakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of a whole step of two layers with an lm_head in 4 bits agree with plain torch,
    for long contexts too, and its note says so."""
    monkeypatch.setattr(step_trial, "LONG_CONTEXTS", (150,))
    torch.manual_seed(1)
    model = model_of(num_hidden_layers=2, quantize_lm_head=True)
    try_kernels(model, CARD, make)
    cache = cache_of(model)
    step = GpuStep.verified(model, cache, 2)
    assert step.note == "decode steps run in CUDA kernels"
    assert 1e-5 < step_trial.error(model, cache, step.logits, [1, 18]) < 2e-2


def test_a_layer_is_eight_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the step that is captured; the last norm is one more. Every kernel may start before the
    one before it has ended."""
    launches = list[str]()

    class Counted:
        def __init__(self, name: str, macros: Sequence[str], grid: Grid) -> None:
            self._name, self._overlaps = name, grid.overlaps

        def launch(self, *arguments: object, blocks: int | None = None) -> None:
            assert self._overlaps
            launches.append(self._name)

    monkeypatch.setattr(use_kernels, "largest_error", lambda *_: torch.zeros(1))
    monkeypatch.setattr(use_kernels, "attention_error", lambda *_: 0.0)
    model = model_of(num_hidden_layers=3)
    try_kernels(model, CARD, Counted)
    numbers = torch.ones(2).long()
    lens, tables = numbers.int(), torch.zeros(2, 1).int()
    GpuStep(model, cache_of(model), 2, in_cuda=True).logits(
        DecodeBatch(numbers, numbers, numbers, lens, tables)
    )
    layer = [
        "few_tokens",
        "rope",
        "attention",
        "few_tokens",
        "add_norm",
        "few_tokens",
        "few_tokens",
    ]
    assert launches == 3 * ["add_norm", *layer] + ["add_norm"]


class InFloat32(CudaProducts):
    """The kernels with floats around them: Triton's interpreter computes wrongly in bfloat16."""

    def _launch(self, product: str, weight: TiledWeight, x: torch.Tensor, *more: Any) -> None:
        order, starts, topk_weights, out, tokens = more
        found = out.to(torch.bfloat16 if product == GATE_UP else torch.float32)
        routing = (order, starts, topk_weights)
        super()._launch(product, weight, x.bfloat16(), *routing, found, tokens)
        out.copy_(found)


def test_a_decode_step_uses_them(make: MakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of a whole step lie within the rounding of activations to bfloat16, with a padding
    row; the runner's note says which form it is."""
    model = model_of(dtype=torch.float32)
    assert model.codebook is not None
    model.products = InFloat32(CARD, model.codebook.code, sizes_of(model.config), 2, make)
    monkeypatch.setitem(step_trial.TOLERANCE, torch.float32, 2e-2)
    cache = cache_of(model)
    step = GpuStep.verified(model, cache, 2)
    reason = "the model computes in float32, the kernels in bfloat16"
    assert step.note.endswith(f"products in CUDA kernels, because not all can be in CUDA: {reason}")
    assert step_trial.error(model, cache, step.logits, [1, 18]) > 1e-5


def test_kernels_that_are_wrong_are_not_used() -> None:
    """The model computes without them, and the reason says so."""
    model = model_of()
    with pytest.raises(StepUnavailable, match="differ from plain torch"):
        try_kernels(model, CARD, Nothing)
    assert model.products is None
    assert "they are for GPUs" in use_cuda_kernels(model, None)


def test_a_step_that_is_wrong_with_them_is_one_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the first trial missed: the step is compared whole, and its note has the reason."""
    model = model_of()
    monkeypatch.setattr(use_kernels, "largest_error", lambda *_: torch.zeros(1))
    monkeypatch.setattr(use_kernels, "attention_error", lambda *_: 0.0)
    try_kernels(model, CARD, Nothing)
    monkeypatch.setattr(
        step_trial, "error", lambda model, *_: 0.0 if model.products is None else 0.5
    )
    step = GpuStep.verified(model, cache_of(model), 2)
    assert step.note == (
        "decode steps run in Triton kernels: with CUDA kernels for 4-bit products it differs from "
        "plain torch by 5.0e-01"
    )
    assert model.products is None


def wrong_from_the_second_split(name: str, text: str) -> str:
    """An edit of the sources: a split counts as the one before it. A context of one split, or one
    row of two, hides that from a mean over rows."""
    changed = text.replace("head * MAX_SPLITS + split;", "head * MAX_SPLITS + split / 2;")
    assert name != "splits.cuh" or changed != text
    return changed


def test_attention_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The products stay in CUDA, the rest of a step is computed by Triton, and the runner's note,
    which `/health` shows, says why."""
    if not has_compiler():
        pytest.skip("g++ compiles the kernels for the host")
    monkeypatch.setattr(use_kernels, "largest_error", lambda *_: torch.zeros(1))
    monkeypatch.setattr(step_trial, "error", lambda *_: 0.0)
    model = model_of()
    try_kernels(model, CARD, HostKernels(wrong_from_the_second_split))
    step = GpuStep.verified(model, cache_of(model), 2)
    assert re.fullmatch(
        "decode steps run in Triton kernels, their 4-bit products in CUDA kernels, because not all "
        "can be in CUDA: "
        # The wrong kernel reads parts that no block has written.
        r"attention in CUDA differs from plain torch by (\d\.\de[+-]\d\d|inf|nan)",
        step.note,
    )


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: model_of(None), "the weights are floats"),
        (lambda: model_of(intermediate_size=192), "down has 2048 rows and 192 columns, which do"),
        (lambda: model_of(dtype=torch.float16), "computes in float16"),
        (lambda: model_of(intermediate_size=256), "down has 2048 rows and 256 columns, and"),
        (lambda: model_of(vocab_size=48, quantize_lm_head=True), "dense has 48 rows and 2048"),
    ],
)
def test_what_they_cannot_compute_is_refused(model: Any, reason: str) -> None:
    """Floats, weights outside of tiles, another dtype and other sizes."""
    assert reason in str(model_problem(model(), CARD))


def test_each_kernel_is_in_the_trial() -> None:
    """The trial has a batch for each kernel of every product."""
    for product, batches in BATCHES.items():
        assert [batch_of(product, tokens) for tokens in TRIAL_TOKENS[-len(batches) :]] == [*batches]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_they_run_on_this_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled, kept in the folder, and in agreement with plain torch, every one of them."""
    monkeypatch.setattr(use_kernels, "TRIAL_TOKENS", TRIAL_TOKENS)
    config = replace(config_of(tiny=True, layers=1), **SMALLEST)  # type: ignore[arg-type]
    model = random_model(config, NF4, torch.bfloat16, torch.device("cuda"))
    assert use_cuda_kernels(model, tmp_path).startswith("4-bit products run in CUDA kernels")
    assert len(list(tmp_path.iterdir())) == 22
