"""Decides whether a model's 4-bit products run in CUDA, and reorders the weights for them.

The weights take the same memory in both orders. Nested absmax becomes bfloat16, which the plan of
the memory counts (`Quantization.on_device`), whether the kernels are used or not.
"""

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from serve_app.model.config import MixtralConfig
from serve_app.model.kernels.cuda.compiler import Compiler
from serve_app.model.kernels.cuda.launcher import Grid, Kernel
from serve_app.model.kernels.cuda.products import CudaProducts, MakeKernel, TiledWeight
from serve_app.model.kernels.cuda.step_kernels import StepKernels, step_misfit
from serve_app.model.kernels.cuda.variants import DENSE, DOWN, GATE_UP, Card, misfit
from serve_app.model.kernels.unavailable import StepUnavailable
from serve_app.model.quantized_weight import QuantizedWeight, expand_absmax

if TYPE_CHECKING:
    from serve_app.model.mixtral import Mixtral

log = logging.getLogger(__name__)

TRIED_TOKENS = (1, 12, 24, 48, 100)
"""Tokens of the batches that the trial computes: each kernel has one."""
TOLERANCE = 2e-2
"""Largest relative error of a product in bfloat16, beside plain torch."""
OLDEST = 80
"""Compute capability 8.0: bfloat16 products and asynchronous copies."""


def use_cuda_kernels(model: "Mixtral", cache: Path | None) -> str:
    """Compiles the kernels, compares them with plain torch on the device, and sets
    `model.products`; or leaves the model as it is. Returns a note for `/health`.

    Compiled kernels are kept in the folder `cache`. Must run before the decode step is made. Raises
    `torch.OutOfMemoryError`, after which the order of the weights is unknown.
    """
    began = time.perf_counter()
    device = model.embedding.device
    try:
        if device.type != "cuda":
            raise StepUnavailable("they are for GPUs")
        if model.embedding.dtype == torch.bfloat16:
            hold_absmax_as_bfloat16(model)
        card = card_of(device)
        if card.capability < OLDEST:
            raise StepUnavailable("the GPU is older than compute capability 8.0")
        compiler = Compiler(card.capability, cache)

        def make(name: str, macros: Any, grid: Grid) -> Kernel:
            return Kernel(compiler.cubin(name, macros), name, grid)

        error = try_kernels(model, card, make)
    except StepUnavailable as reason:
        return f"4-bit products do not run in CUDA kernels: {reason}"
    except torch.OutOfMemoryError:
        raise
    except Exception as failure:  # a compiler or driver may raise anything; Triton serves
        log.exception("the CUDA kernels failed in their trial")
        restore(model)
        reason_text = f"{type(failure).__name__}: {str(failure)[:200]}"
        return f"4-bit products do not run in CUDA kernels: the trial failed ({reason_text})"
    return (
        f"4-bit products run in CUDA kernels for compute capability {card.capability / 10:.1f}, by "
        f"NVRTC {compiler.version}; ready in {time.perf_counter() - began:.1f} s, within "
        f"{error:.1e} of plain torch"
    )


def hold_absmax_as_bfloat16(model: "Mixtral") -> None:
    """Turns nested absmax of all weights into bfloat16, whichever kernels read it then."""
    if model.codebook is not None:
        stored = [each for each in model.modules() if isinstance(each, QuantizedWeight)]
        expand_absmax(model.codebook, stored)


def try_kernels(model: "Mixtral", card: Card, make: MakeKernel) -> float:
    """Sets `model.products` if they agree with plain torch on the first layer; returns the largest
    relative error. Raises `StepUnavailable` where they do not fit or do not agree."""
    if (reason := unfit(model, card)) is not None:
        raise StepUnavailable(reason)
    config = model.config
    sizes = {
        DENSE: {config.hidden_size, config.q_size},
        GATE_UP: {config.hidden_size},
        DOWN: {config.intermediate_size},
    }
    assert model.codebook is not None
    code = model.codebook.code
    products = CudaProducts(card, code, sizes, config.num_experts_per_tok, make)
    first: Any = model.layers[0]
    for weight in weights_of(first):
        weight.to_tiles()
    error = largest_error(products, first, config)
    if not error < TOLERANCE:  # NaN is not below it either
        restore(model)
        raise StepUnavailable(f"they differ from plain torch by {error:.1e}")
    for layer in model.layers[1:]:
        for weight in weights_of(layer):
            weight.to_tiles()
    if step_misfit(config) is None:
        products.step_kernels = StepKernels(config, card, make)
    model.products = products
    return error


def restore(model: "Mixtral") -> None:
    """Gives up the kernels: all weights are in the order of checkpoints again."""
    model.products = None
    for layer in model.layers:
        for weight in weights_of(layer):
            if weight.is_tiled:
                weight.from_tiles()


def unfit(model: "Mixtral", card: Card) -> str | None:
    """Why the kernels cannot compute the model; None where they can."""
    config, codebook = model.config, model.codebook
    if codebook is None:
        return "the weights are floats"
    if model.float_modules:
        return "some layers have experts or attention in floats beside 4 bits"
    if codebook.quantization.absmax == "nested":
        return "absmax is nested"
    if model.embedding.dtype != torch.bfloat16:
        return f"the model computes in {str(model.embedding.dtype)[6:]}, and they in bfloat16"
    hidden, inner, queries = config.hidden_size, config.intermediate_size, config.q_size
    shapes = (
        (DENSE, queries + 2 * config.kv_size, hidden),
        (DENSE, hidden, queries),
        (GATE_UP, 2 * inner, hidden),
        (DOWN, hidden, inner),
    )
    return next((why for each in shapes if (why := misfit(each[0], card, *each[1:]))), None)


def card_of(device: torch.device) -> Card:
    """The GPU as the kernels see it."""
    major, minor = torch.cuda.get_device_capability(device)
    properties = torch.cuda.get_device_properties(device)
    return Card(10 * major + minor, properties.multi_processor_count)


def weights_of(layer: Any) -> Iterator[QuantizedWeight]:
    """The weights of a layer that the kernels read."""
    yield layer.attention.qkv.weight
    yield layer.attention.o.weight
    yield layer.mlp.experts.gate_up
    yield layer.mlp.experts.down


@torch.inference_mode()
def largest_error(products: CudaProducts, layer: Any, config: MixtralConfig) -> float:
    """The largest relative error of a layer's products on random data, beside plain torch."""
    device = layer.mlp.router.device
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, torch.bfloat16)

    errors = []
    for tokens in TRIED_TOKENS:
        for linear, size in (
            (layer.attention.qkv, config.hidden_size),
            (layer.attention.o, config.q_size),
        ):
            x, weight = random(tokens, size), tiled(linear.weight)
            out = torch.empty(tokens, weight.out_features, device=device)
            products.dense(weight, x, out)
            errors.append(relative(out, linear(x)))
        x = random(tokens, config.hidden_size)
        scores = torch.rand(tokens, config.num_local_experts, generator=generator)
        topk_ids = scores.topk(config.num_experts_per_tok).indices.to(device)
        topk_weights = random(tokens, config.num_experts_per_tok).softmax(-1)
        found = mixture(products, layer.mlp.experts, x, topk_ids, topk_weights)
        errors.append(relative(found, layer.mlp.experts(x, topk_ids, topk_weights)))
    return float(torch.stack(errors).max())  # NaN where one is


def relative(found: Tensor, expected: Tensor) -> Tensor:
    error: Tensor = (found.float() - expected.float()).norm() / expected.float().norm()
    return error


def mixture(
    products: CudaProducts, experts: Any, x: Tensor, topk_ids: Tensor, topk_weights: Tensor
) -> Tensor:
    """What `Experts.forward` computes, by the kernels; float32 `[T, H]`."""
    tokens, top_k = topk_ids.shape
    gate_up, down = tiled(experts.gate_up), tiled(experts.down)
    flat = topk_ids.flatten()
    edges = torch.arange(gate_up.num_matrices + 1, device=x.device)
    starts = (flat[None] < edges[:, None]).sum(1).int()
    order = flat.argsort(stable=True).int()
    inner = x.new_empty(len(flat), down.in_features)
    products.gate_up(gate_up, x, order, starts, inner)
    out = torch.empty(len(flat), down.out_features, device=x.device)
    products.down(down, inner, order, starts, topk_weights.flatten().float(), top_k, out)
    return out.view(tokens, top_k, -1).sum(1)


def tiled(weight: QuantizedWeight) -> TiledWeight:
    """A weight in tiles as the kernels read it; it shares the memory."""
    rows, half = weight.packed.shape[-2:]
    return TiledWeight(weight.packed.view(-1, rows, half), weight.absmax.view(-1, rows, half // 32))
