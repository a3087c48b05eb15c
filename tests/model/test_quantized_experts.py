"""4-bit experts and linear layers against transformers with what bitsandbytes unpacks."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig as TheirConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from serve_app.model.config import MixtralConfig
from serve_app.model.linear import QuantizedLinear
from serve_app.model.quantization import Quantization
from serve_app.model.quantize import absmax_values, dequantize, quantize
from serve_app.model.quantized_experts import QuantizedExperts
from serve_app.model.quantized_weight import Codebook
from tests.model.quantized_oracle import VARIANTS, name, round_experts, rounded

SHAPES = {
    "one-block": {"hidden_size": 64, "intermediate_size": 64},
    "odd": {"hidden_size": 192, "intermediate_size": 320, "num_local_experts": 5},
    "one-expert": {
        "hidden_size": 128,
        "intermediate_size": 64,
        "num_local_experts": 1,
        "num_experts_per_tok": 1,
    },
    "three-of-seven": {
        "hidden_size": 64,
        "intermediate_size": 448,
        "num_local_experts": 7,
        "num_experts_per_tok": 3,
    },
    "tiles": {"hidden_size": 512, "intermediate_size": 256, "num_local_experts": 3},
}
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def random_block(shape: str, dtype: torch.dtype) -> Any:
    """Returns transformers' sparse layer with random weights, none of them quantized."""
    torch.manual_seed(3)
    block = MixtralSparseMoeBlock(TheirConfig(**SHAPES[shape])).requires_grad_(False)
    for weight in block.parameters():
        weight.normal_(0, weight.shape[-1] ** -0.5)
    return block.to(dtype)


def quantized(block: Any, how: Quantization) -> QuantizedExperts:
    """Returns our experts with the weights of transformers' `block`."""
    gate_up, down = block.experts.gate_up_proj, block.experts.down_proj
    experts = QuantizedExperts(
        MixtralConfig.from_dict(
            {
                "model_type": "mixtral",
                "num_hidden_layers": 1,
                "hidden_size": gate_up.shape[2],
                "intermediate_size": down.shape[2],
                "num_attention_heads": 1,
                "num_local_experts": len(down),
                "num_experts_per_tok": 1,
                "vocab_size": 8,
                "max_position_embeddings": 8,
            }
        ),
        Codebook(how.quant_type),
    )
    for i, matrices in enumerate(gate_up):
        gate, up = matrices.chunk(2)
        experts.down.load_weight(down[i], i)
        experts.gate_up.load_weight(up, i, 1)
        experts.gate_up.load_weight(gate, i, 0)
    return experts


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("how", VARIANTS, ids=name)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_sparse_layer_equals_transformers(
    shape: str, how: Quantization, dtype: torch.dtype
) -> None:
    """The same input and routing give what transformers computes from dequantized weights."""
    block = random_block(shape, dtype)
    ours = quantized(block, how)
    round_experts(block.experts, how)
    for num_tokens in (1, 2, 7, 33):
        x = torch.randn(num_tokens, block.gate.weight.shape[1], dtype=dtype)
        _, weights, expert_ids = block.gate(x)
        expected = block.experts(x, expert_ids, weights)
        assert relative_error(ours(x, expert_ids, weights.to(dtype)), expected) < LIMITS[dtype]


@pytest.mark.parametrize("how", VARIANTS, ids=name)
def test_quantized_and_float_weights_are_stored_alike(how: Quantization) -> None:
    """Giving a matrix that is quantized already stores what giving its floats does."""
    block = random_block("odd", torch.float32)
    ours, again = quantized(block, how), quantized(block, how)
    for stored in again.buffers():
        stored.zero_()
    gate, up = block.experts.gate_up_proj[2].chunk(2)
    for target, part, weight in (
        (again.gate_up, 0, gate),
        (again.gate_up, 1, up),
        (again.down, 0, block.experts.down_proj[2]),
    ):
        target.load_weight(quantize(weight, how.quant_type, how.absmax), 2, part)
    for one, other in ((ours.gate_up, again.gate_up), (ours.down, again.down)):
        mine, its = dict(one.named_buffers(recurse=False)), dict(other.named_buffers())
        for kind, stored in mine.items():
            assert torch.equal(stored[2], its[kind][2]), kind
            assert not its[kind][[0, 1, 3, 4]].any(), kind


@pytest.mark.parametrize("columns", [192, 256])
def test_a_checkpoints_absmax_is_rounded_once(columns: int) -> None:
    """Nested and float32 absmax become bfloat16, row by row and in tiles."""
    weight = torch.randn(128, columns)
    nested, plain = quantize(weight, "nf4", "nested"), quantize(weight, "nf4", "float32")
    rounded_once = absmax_values(nested.absmax, nested.nested).bfloat16()
    for stored, expected in (
        (nested, replace(nested, absmax=rounded_once, nested=None)),
        (plain, quantize(weight, "nf4", "bfloat16")),
    ):
        linear = QuantizedLinear(Codebook("nf4"), columns, (128,))
        linear.weight.load_weight(stored)
        assert linear.weight.is_tiled == (columns == 256)
        unpacked = dequantize(linear.weight.get(), torch.float32)
        assert torch.equal(unpacked, dequantize(expected, torch.float32))


@pytest.mark.parametrize("how", VARIANTS, ids=name)
def test_fused_projections_keep_their_own_quantization(how: Quantization) -> None:
    """q, k and v in one matrix are what bitsandbytes makes of each alone, in any order."""
    parts = [torch.randn(rows, 192) * scale for rows, scale in ((128, 1), (64, 5), (64, 0.01))]
    linear = QuantizedLinear(Codebook(how.quant_type), 192, (128, 64, 64))
    for part in (2, 0, 1):
        linear.weight.load_weight(parts[part], part=part)
    expected = torch.cat([rounded(part, how) for part in parts])
    assert torch.equal(dequantize(linear.weight.get(), torch.float32), expected)
    x = torch.randn(5, 192)
    torch.testing.assert_close(linear(x), x @ expected.T)


@pytest.mark.parametrize("how", VARIANTS, ids=name)
def test_moving_and_casting_keeps_every_bit(how: Quantization) -> None:
    """`to(dtype)` is for the model's floats: storage keeps its bytes and its dtypes."""
    linear = QuantizedLinear(Codebook(how.quant_type), 128, (64,))
    linear.weight.load_weight(torch.randn(64, 128))
    before = {name: stored.clone() for name, stored in linear.named_buffers()}
    for stored_name, stored in linear.to(torch.bfloat16).named_buffers():
        assert stored.dtype == before[stored_name].dtype
        assert torch.equal(stored, before[stored_name])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("how", VARIANTS[:2], ids=name)  # the code's values make no difference
def test_a_row_has_the_same_bits_in_any_batch(how: Quantization, threads: int) -> None:
    """A token's result alone is exactly its result among 40 others, in float32."""
    torch.set_num_threads(threads)
    block = random_block("odd", torch.float32)
    experts = quantized(block, how)
    x = torch.randn(41, 192)
    _, weights, expert_ids = block.gate(x)
    together = experts(x, expert_ids, weights)
    for size in (1, 2, 3, 5, 8, 13, 31):
        some = slice(size % 7, size % 7 + size)
        alone = experts(x[some], expert_ids[some], weights[some])
        assert torch.equal(alone, together[some]), size
