"""A weight quantized by bitsandbytes to 4 bits, and transformers' Mixtral with such weights."""

from typing import Any

import torch
from torch import Tensor

from serve_app.model.quantization import Quantization
from tests.bitsandbytes_functions import functional

VARIANTS = [Quantization("nf4", "bfloat16"), Quantization("fp4", "bfloat16")]
"""What models hold in memory."""


def name(how: Quantization) -> str:
    return f"{how.quant_type}-{how.absmax}"


def rounded(weight: Tensor, how: Quantization) -> Tensor:
    """Returns `weight` `[N, K]` quantized and back, by bitsandbytes alone, in its dtype."""
    bnb = functional()
    packed, state = bnb.quantize_4bit(
        weight.contiguous(),
        blocksize=64,
        quant_type=how.quant_type,
    )
    state.absmax = state.absmax.bfloat16().float()
    values: Tensor = bnb.dequantize_4bit(packed, state)
    return values


def round_experts(experts: Any, how: Quantization) -> None:
    """Rounds the weights of transformers' `MixtralExperts` in place, matrix by matrix."""
    for gate_up, down in zip(experts.gate_up_proj, experts.down_proj, strict=True):
        for matrix in (*gate_up.chunk(2), down):
            matrix.copy_(rounded(matrix, how))


def round_model(oracle: Any, how: Quantization) -> None:
    """Rounds the experts and the attention projections of a `MixtralForCausalLM` in place."""
    with torch.no_grad():
        for layer in oracle.model.layers:
            round_experts(layer.mlp.experts, how)
            for projection in "qkvo":
                weight = getattr(layer.self_attn, f"{projection}_proj").weight
                weight.copy_(rounded(weight, how))
