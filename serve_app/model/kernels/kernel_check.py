"""Compares 4-bit products and attention on a device with plain float32, on random data.

`mixtral-serve check --load` refuses a device on which a kernel is wrong. The check is for
correctness, not speed, so its sizes are small, except for one long context. The CUDA kernels of
products need larger sizes; `use_kernels.py` compares them at each load, with the model's weights.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from serve_app.model.config import MixtralConfig
from serve_app.model.kernels.attention_check import attention_error
from serve_app.model.kernels.cuda.compiler import Compiler
from serve_app.model.kernels.cuda.step_kernels import StepKernels
from serve_app.model.kernels.cuda.use_kernels import (
    OLDEST,
    card_of,
    maker_of,
    step_attention_error,
)
from serve_app.model.kernels.decode_batch import DecodeBatch
from serve_app.model.kernels.unavailable import StepUnavailable
from serve_app.model.linear import QuantizedLinear
from serve_app.model.quantization import Quantization
from serve_app.model.quantize import dequantize, quantize
from serve_app.model.quantized_experts import QuantizedExperts
from serve_app.model.quantized_weight import Codebook

HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_EXPERTS, TOP_K = 256, 256, 4, 2
CONFIG = MixtralConfig.from_dict(
    {
        "model_type": "mixtral",
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": INTERMEDIATE_SIZE,
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "num_local_experts": NUM_EXPERTS,
        "num_experts_per_tok": TOP_K,
        "vocab_size": 64,
        "max_position_embeddings": 64,
    }
)
NUM_TOKENS = (1, 7, 40)
"""Numbers of tokens: one decode, a few decodes, and a prefill chunk."""


def relative_errors(
    quantization: Quantization,
    dtype: torch.dtype,
    device: torch.device,
    *,
    has_kernels: bool | None = None,
) -> dict[str, float]:
    """Returns the largest relative error of each product over all `NUM_TOKENS`.

    `has_kernels` says whether to check the Triton kernels; None checks them on a GPU with a 16-bit
    dtype. On a GPU with bfloat16, the CUDA kernel for attention is checked too. If an error is NaN,
    only this error is returned.
    """
    if has_kernels is None:
        has_kernels = device.type == "cuda" and dtype != torch.float32
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    codes = Codebook(quantization.quant_type).to(device)
    linear, weight = _linear(codes, device, random(INTERMEDIATE_SIZE, HIDDEN_SIZE))
    experts, expert_weights = _experts(codes, device, random)
    errors: dict[str, float] = {}
    gate_up = dequantize(experts.gate_up.get(), torch.float32)
    for count in NUM_TOKENS:
        x = random(count, HIDDEN_SIZE).to(device, dtype)
        topk_ids = torch.stack(
            [torch.randperm(NUM_EXPERTS, generator=generator) for _ in range(count)]
        )
        topk_ids = topk_ids[:, :TOP_K].to(device)
        topk_weights = random(count, TOP_K).softmax(-1).to(device, dtype)
        pairs = {
            "linear (torch)": (linear(x), F.linear(x.float(), weight)),
            "experts (torch)": (
                experts(x, topk_ids, topk_weights),
                _mixture(x.float(), topk_ids, topk_weights.float(), expert_weights),
            ),
        }
        if has_kernels:
            pairs["linear (triton)"] = (_linear_by_kernel(linear, x), pairs["linear (torch)"][1])
            actual = _experts_by_kernel(experts, x, topk_ids, topk_weights)
            pairs["experts (triton)"] = (actual, pairs["experts (torch)"][1])
            pairs["unpacked (triton)"] = (_unpacked(experts, x.dtype), gate_up)
        for name, (actual, expected) in pairs.items():
            error = float((actual.float() - expected).norm() / expected.norm())
            if math.isnan(error):  # max() may drop a NaN
                return {name: error}
            errors[name] = max(errors.get(name, 0.0), error)
    if has_kernels:
        errors["attention (triton)"] = _attention_by_triton(dtype, device)
    if device.type == "cuda" and dtype == torch.bfloat16:
        errors |= _attention_by_cuda(device)
    return errors


def _attention_by_triton(dtype: torch.dtype, device: torch.device) -> float:
    """Returns the relative error of the Triton kernel."""
    from serve_app.model.kernels.triton.paged_attention import PagedAttention

    def attention(
        queries: Tensor, keys: Tensor, values: Tensor, batch: DecodeBatch, out: Tensor
    ) -> None:
        kernel = PagedAttention(queries.shape[1], keys, CONFIG.sliding_window, len(queries))
        kernel(queries, keys, values, batch.tables, batch.context_lens, out)

    return attention_error(attention, CONFIG, dtype, device)


def _attention_by_cuda(device: torch.device) -> dict[str, float]:
    """Returns the relative error of the CUDA kernel, by its name; nothing where it cannot run."""
    card = card_of(device)
    try:
        if card.capability < OLDEST:
            return {}
        kernels = StepKernels(CONFIG, card, maker_of(Compiler(card.capability)))
    except StepUnavailable:
        return {}
    return {"attention (cuda)": step_attention_error(kernels, CONFIG, device)}


def _linear(
    codes: Codebook, device: torch.device, weight: Tensor
) -> tuple[QuantizedLinear, Tensor]:
    """Returns a 4-bit linear layer and its weight in float32."""
    linear = QuantizedLinear(codes, weight.shape[1], (weight.shape[0],)).to(device)
    linear.weight.load_weight(weight)
    return linear, _as_stored(codes, weight).to(device)


def _experts(
    codes: Codebook, device: torch.device, random: Callable[..., Tensor]
) -> tuple[QuantizedExperts, list[dict[str, Tensor]]]:
    """Returns 4-bit experts and the float32 matrices of each."""
    sizes = {
        "gate": (INTERMEDIATE_SIZE, HIDDEN_SIZE),
        "up": (INTERMEDIATE_SIZE, HIDDEN_SIZE),
        "down": (HIDDEN_SIZE, INTERMEDIATE_SIZE),
    }
    experts = QuantizedExperts(CONFIG, codes).to(device)
    plain = []
    for expert in range(NUM_EXPERTS):
        weights = {name: random(*size) for name, size in sizes.items()}
        experts.gate_up.load_weight(weights["gate"], expert, 0)
        experts.gate_up.load_weight(weights["up"], expert, 1)
        experts.down.load_weight(weights["down"], expert)
        plain.append({name: _as_stored(codes, w).to(device) for name, w in weights.items()})
    return experts, plain


def _linear_by_kernel(linear: QuantizedLinear, x: Tensor) -> Tensor:
    from serve_app.model.kernels.triton import nf4_decode

    weights = nf4_decode.Packed.from_weight(linear.weight, x.dtype)
    parts = x.new_empty(nf4_decode.SPLIT_K, len(x), weights.out_features, dtype=torch.float32)
    nf4_decode.dense(weights, x, parts)
    return parts.sum(0)


def _unpacked(experts: QuantizedExperts, dtype: torch.dtype) -> Tensor:
    from serve_app.model.kernels.triton.nf4_unpack import Unpacker

    all_experts = torch.arange(NUM_EXPERTS, device=experts.gate_up.packed.device)
    return Unpacker(dtype)(experts.gate_up, all_experts)


def _experts_by_kernel(
    experts: QuantizedExperts, x: Tensor, topk_ids: Tensor, topk_weights: Tensor
) -> Tensor:
    from serve_app.model.kernels.triton import nf4_decode

    order = topk_ids.flatten().argsort(stable=True).int()
    edges = torch.arange(NUM_EXPERTS + 1, device=x.device)
    starts = (topk_ids.flatten()[None] < edges[:, None]).sum(1).int()
    gate_up = nf4_decode.Packed.from_weight(experts.gate_up, x.dtype)
    down = nf4_decode.Packed.from_weight(experts.down, x.dtype)
    intermediate = x.new_empty(len(order), down.in_features)
    nf4_decode.gate_up(gate_up, x, order, starts, TOP_K, intermediate)
    parts = x.new_empty(nf4_decode.SPLIT_K, len(order), down.out_features, dtype=torch.float32)
    nf4_decode.down(down, intermediate, order, starts, topk_weights.flatten().float(), TOP_K, parts)
    return parts.sum(0).view(len(x), TOP_K, -1).sum(1)


def _as_stored(codes: Codebook, weight: Tensor) -> Tensor:
    """Returns `weight` quantized and dequantized on the CPU."""
    return dequantize(quantize(weight, codes.quant_type, "bfloat16"), torch.float32)


def _mixture(
    x: Tensor, topk_ids: Tensor, topk_weights: Tensor, experts: list[dict[str, Tensor]]
) -> Tensor:
    """Computes the same as `Experts.forward`, token by token."""
    rows = []
    for token, chosen, weights in zip(x, topk_ids.tolist(), topk_weights, strict=True):
        outputs = [
            e["down"] @ (F.silu(e["gate"] @ token) * (e["up"] @ token))
            for e in (experts[i] for i in chosen)
        ]
        rows.append((torch.stack(outputs) * weights[:, None]).sum(dim=0))
    return torch.stack(rows)
