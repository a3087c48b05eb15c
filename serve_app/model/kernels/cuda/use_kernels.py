"""Decides whether a model's 4-bit products run in CUDA."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from serve_app.model.config import MixtralConfig
from serve_app.model.kernels.attention_check import attention_error
from serve_app.model.kernels.cuda.compiler import Compiler
from serve_app.model.kernels.cuda.launchable import MakeKernel
from serve_app.model.kernels.cuda.launcher import Grid, Kernel
from serve_app.model.kernels.cuda.products import CudaProducts, TiledWeight
from serve_app.model.kernels.cuda.sampling import SampleKernel
from serve_app.model.kernels.cuda.step_kernels import (
    AttentionMemory,
    StepKernels,
    config_problem,
)
from serve_app.model.kernels.cuda.tiles import COLUMNS, ROWS
from serve_app.model.kernels.cuda.variants import DENSE, DOWN, GATE_UP, Card, shape_problem
from serve_app.model.kernels.decode_batch import DecodeBatch
from serve_app.model.kernels.unavailable import StepUnavailable
from serve_app.model.linear import QuantizedLinear
from serve_app.model.quantized_weight import QuantizedWeight

if TYPE_CHECKING:
    from serve_app.model.mixtral import Mixtral

log = logging.getLogger(__name__)

TRIAL_TOKENS = (1, 12, 24, 48, 100, 200)
"""Number of tokens of each batch in the trial. Together they use every kernel."""
TOLERANCE = 2e-2
"""Maximum relative error of a bfloat16 product, compared with plain torch."""
ATTENTION_TOLERANCE = 1e-2
"""Maximum relative error of a row of attention, compared with float32. Rounding causes 3e-3."""
OLDEST = 80
"""Minimum compute capability (8.0), which has bfloat16 products and asynchronous copies."""


def use_cuda_kernels(model: "Mixtral", cache: Path | None, filled: Sequence[Path] = ()) -> str:
    """Sets `model.products` if the kernels compile and agree with plain torch on the device.

    Otherwise the model does not change. Returns a note for `/health`. `cache` and `filled` are
    those of `Compiler`. Call it before the decode step is created. Raises
    `torch.OutOfMemoryError`.
    """
    began = time.perf_counter()
    device = model.embedding.device
    try:
        if device.type != "cuda":
            raise StepUnavailable("they are for GPUs")
        card = card_of(device)
        if card.capability < OLDEST:
            raise StepUnavailable("the GPU is older than compute capability 8.0")
        compiler = Compiler(card.capability, cache, filled)
        error = try_kernels(model, card, maker_of(compiler))
    except StepUnavailable as reason:
        return f"4-bit products do not run in CUDA kernels: {reason}"
    except torch.OutOfMemoryError:
        raise
    except Exception as failure:  # a compiler or driver may raise any exception
        log.exception("the CUDA kernels failed in their trial")
        reason_text = f"{type(failure).__name__}: {str(failure)[:200]}"
        return f"4-bit products do not run in CUDA kernels: the trial failed ({reason_text})"
    return (
        f"4-bit products run in CUDA kernels for compute capability {card.capability / 10:.1f}, by "
        f"NVRTC {compiler.version}; ready in {time.perf_counter() - began:.1f} s, within "
        f"{error:.1e} of plain torch"
    )


def try_kernels(model: "Mixtral", card: Card, make: MakeKernel) -> float:
    """Sets `model.products` if the kernels agree with plain torch on the first layer.

    Returns the largest relative error. Raises `StepUnavailable` if the kernels cannot compute the
    model or do not agree.
    """
    if (reason := model_problem(model, card)) is not None:
        raise StepUnavailable(reason)
    config = model.config
    assert model.codebook is not None
    products = products_of(config, card, model.codebook.code, make)
    error = largest_error(products, model.layers[0], config)
    if not error < TOLERANCE:  # also true for NaN
        raise StepUnavailable(f"they differ from plain torch by {error:.1e}")
    products.make_sampler = lambda max_rows: SampleKernel(
        config.vocab_size, max_rows, card, model.embedding.device, make
    )
    try:
        products.step_kernels = verified_step_kernels(config, card, make, model.embedding.device)
    except StepUnavailable as reason:
        products.step_problem = str(reason)
    model.products = products
    return error


def verified_step_kernels(
    config: MixtralConfig, card: Card, make: MakeKernel, device: torch.device
) -> StepKernels:
    """Returns the other kernels of a decode step.

    `GpuStep.verified` compares a whole step with plain torch. Raises `StepUnavailable` if the
    kernels do not fit the model or if attention differs from plain torch.
    """
    if (reason := config_problem(config)) is not None:
        raise StepUnavailable(reason)
    kernels = StepKernels(config, card, make)
    error = step_attention_error(kernels, config, device)
    if not error < ATTENTION_TOLERANCE:
        raise StepUnavailable(f"attention in CUDA differs from plain torch by {error:.1e}")
    return kernels


def step_attention_error(
    kernels: StepKernels, config: MixtralConfig, device: torch.device
) -> float:
    """Returns the largest relative error of a row of attention by `kernels`."""

    def attention(
        queries: Tensor, keys: Tensor, values: Tensor, batch: DecodeBatch, out: Tensor
    ) -> None:
        memory = AttentionMemory(config, len(queries), device)
        kernels.attention(queries, keys, values, batch, memory, out)

    return attention_error(attention, config, torch.bfloat16, device)


def products_of(config: MixtralConfig, card: Card, code: Tensor, make: MakeKernel) -> CudaProducts:
    """Returns the products of a model with these sizes; `code` has the 16 code values."""
    return CudaProducts(card, code, sizes_of(config), config.num_experts_per_tok, make)


def sizes_of(config: MixtralConfig) -> dict[str, set[tuple[int, int]]]:
    """Returns N and K of the matrices of each product, with those of a 4-bit `lm_head`."""
    hidden, inner, queries = config.hidden_size, config.intermediate_size, config.q_size
    qkv = (queries + 2 * config.kv_size, hidden)
    return {
        DENSE: {qkv, (hidden, queries), (config.vocab_size, hidden)},
        GATE_UP: {(2 * inner, hidden)},
        DOWN: {(hidden, inner)},
    }


def tiling_problem(model: "Mixtral") -> str | None:
    """Returns the reason why a kernel cannot read the model's 4-bit weights, or None if it can or
    if the weights are floats."""
    for name, weight in model.named_modules():
        if isinstance(weight, QuantizedWeight) and not weight.is_tiled:
            rows, half = weight.packed.shape[-2:]
            return (
                f"{name.rpartition('.')[2]} has {rows} rows and {2 * half} columns, which do not "
                f"fill tiles of {ROWS} by {COLUMNS}"
            )
    return None


def model_problem(model: "Mixtral", card: Card) -> str | None:
    """Returns the reason why the kernels cannot compute the model, or None if they can."""
    config = model.config
    if model.codebook is None:
        return "the weights are floats"
    if model.float_modules:
        return "some layers have experts or attention in floats beside 4 bits"
    if (outside := tiling_problem(model)) is not None:
        return outside
    if model.embedding.dtype != torch.bfloat16:
        return f"the model computes in {str(model.embedding.dtype)[6:]}, the kernels in bfloat16"
    hidden, inner, queries = config.hidden_size, config.intermediate_size, config.q_size
    shapes = [
        (DENSE, queries + 2 * config.kv_size, hidden),
        (DENSE, hidden, queries),
        (GATE_UP, 2 * inner, hidden),
        (DOWN, hidden, inner),
    ]
    if isinstance(model.lm_head, QuantizedLinear):
        shapes.append((DENSE, config.vocab_size, hidden))
    return next(
        (reason for shape in shapes if (reason := shape_problem(shape[0], card, *shape[1:]))), None
    )


def maker_of(compiler: Compiler) -> MakeKernel:
    """Returns the function that compiles kernels and loads them into the current context."""

    def make(name: str, macros: Sequence[str], grid: Grid) -> Kernel:
        return Kernel(compiler.cubin(name, macros), name, grid)

    return make


def card_of(device: torch.device) -> Card:
    """Returns the properties of the GPU `device` that the kernels depend on."""
    major, minor = torch.cuda.get_device_capability(device)
    properties = torch.cuda.get_device_properties(device)
    return Card(10 * major + minor, properties.multi_processor_count)


@torch.inference_mode()
def largest_error(products: CudaProducts, layer: Any, config: MixtralConfig) -> float:
    """Returns the largest relative error of a layer's products on random data, compared with plain
    torch; NaN if an error is NaN."""
    device = layer.mlp.router.device
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, torch.bfloat16)

    errors = []
    for tokens in TRIAL_TOKENS:
        for linear, size in (
            (layer.attention.qkv, config.hidden_size),
            (layer.attention.o, config.q_size),
        ):
            x, weight = random(tokens, size), tiled(linear.weight)
            out = torch.empty(tokens, weight.out_features, device=device)
            products.dense(weight, x, out)
            errors.append(relative_error(out, linear(x)))
        x = random(tokens, config.hidden_size)
        scores = torch.rand(tokens, config.num_local_experts, generator=generator)
        topk_ids = scores.topk(config.num_experts_per_tok).indices.to(device)
        topk_weights = random(tokens, config.num_experts_per_tok).softmax(-1)
        actual = mixture(products, layer.mlp.experts, x, topk_ids, topk_weights)
        errors.append(relative_error(actual, layer.mlp.experts(x, topk_ids, topk_weights)))
    return float(torch.stack(errors).max())


def relative_error(actual: Tensor, expected: Tensor) -> Tensor:
    error: Tensor = (actual.float() - expected.float()).norm() / expected.float().norm()
    return error


def mixture(
    products: CudaProducts, experts: Any, x: Tensor, topk_ids: Tensor, topk_weights: Tensor
) -> Tensor:
    """Computes `Experts.forward` with the kernels. Returns float32 `[tokens, hidden_size]`."""
    tokens, top_k = topk_ids.shape
    gate_up, down = tiled(experts.gate_up), tiled(experts.down)
    flat = topk_ids.flatten()
    edges = torch.arange(gate_up.num_matrices + 1, device=x.device)
    starts = (flat[None] < edges[:, None]).sum(1).int()
    order = flat.argsort(stable=True).int()
    weights = topk_weights.flatten().float()
    out = products.experts(gate_up, down, x, order, starts, weights)
    return out.view(tokens, top_k, -1).sum(1)


def tiled(weight: QuantizedWeight) -> TiledWeight:
    """Returns a view of a weight in tiles, in the form that the kernels read."""
    rows, half = weight.packed.shape[-2:]
    return TiledWeight(weight.packed.view(-1, rows, half), weight.absmax.view(-1, rows, half // 32))
