"""4-bit matrices against bitsandbytes, bit for bit."""

from typing import get_args

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from serve_app.model.quantization import AbsmaxKind, QuantType
from serve_app.model.quantize import code_values, dequantize, dynamic_map, quantize
from tests.bitsandbytes_functions import functional

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
bnb = functional()
TYPES = st.sampled_from(get_args(QuantType))


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """Draws `[N, K]`: groups of zeros, single values, ties between codes, huge and small values."""
    shape = (draw(st.integers(1, 40)), 64 * draw(st.integers(1, 9)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    weight = torch.randn(shape, generator=generator)
    match draw(st.sampled_from(["normal", "uniform", "heavy", "few", "ties"])):
        case "uniform":
            weight = torch.rand(shape, generator=generator) - 0.3
        case "heavy":
            weight = weight**9
        case "few":
            weight *= torch.rand(shape, generator=generator) < 0.02
        case "ties":
            weight = torch.randint(-12, 13, shape, generator=generator) / 12
    weight *= 10.0 ** draw(st.integers(-6, 4))
    # Blocks of very different sizes, some of them zero.
    blocks = weight.view(-1, 64)
    blocks *= torch.rand(len(blocks), 1, generator=generator) < draw(st.sampled_from([0.5, 1.0]))
    blocks *= torch.randn(len(blocks), 1, generator=generator).exp()
    return weight.clamp(-60000, 60000).to(draw(st.sampled_from(DTYPES)))


def assert_same_bits(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours.flatten().view(torch.uint8), theirs.flatten().view(torch.uint8))


def test_the_tables_are_bitsandbytes_tables() -> None:
    """The code values of nf4 and fp4, and the values of 8-bit absmax, equal bitsandbytes'."""
    for quant_type in get_args(QuantType):
        assert_same_bits(code_values(quant_type), bnb.get_4bit_type(quant_type, "cpu"))
    assert_same_bits(dynamic_map(), bnb.create_dynamic_map())


@given(weights(), TYPES)
@settings(max_examples=150)
def test_plain_absmax_equals_bitsandbytes(weight: Tensor, quant_type: QuantType) -> None:
    """Nibbles, absmax and dequantized float32 are equal; bfloat16 absmax is that one, rounded."""
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=quant_type)
    q = quantize(weight, quant_type, "float32")
    assert q.shape == weight.shape
    assert_same_bits(q.packed, packed)
    assert_same_bits(q.absmax, state.absmax)
    state.dtype = torch.float32
    assert torch.equal(dequantize(q, torch.float32), bnb.dequantize_4bit(packed, state))

    rounded = quantize(weight, quant_type, "bfloat16")
    assert_same_bits(rounded.packed, packed)
    assert_same_bits(rounded.absmax, state.absmax.bfloat16())


@given(weights(), TYPES)
@settings(max_examples=150)
def test_nested_absmax_equals_bitsandbytes(weight: Tensor, quant_type: QuantType) -> None:
    """Nested: 8-bit absmax, its own absmax, its offset, and dequantized float32 are equal."""
    packed, state = bnb.quantize_4bit(
        weight, blocksize=64, quant_type=quant_type, compress_statistics=True
    )
    q = quantize(weight, quant_type, "nested")
    assert q.nested is not None
    assert_same_bits(q.packed, packed)
    assert_same_bits(q.absmax, state.absmax)
    assert_same_bits(q.nested.absmax, state.state2.absmax)
    assert_same_bits(q.nested.offset, state.offset)
    state.dtype = torch.float32
    assert torch.equal(dequantize(q, torch.float32), bnb.dequantize_4bit(packed, state))


@given(weights(), TYPES, st.sampled_from(get_args(AbsmaxKind)))
@settings(max_examples=60)
def test_a_stack_is_its_matrices(weight: Tensor, quant_type: QuantType, absmax: AbsmaxKind) -> None:
    """Matrices of a stack are quantized as each alone, offsets included."""
    stack = torch.stack((weight, weight.flip(0) / 3, torch.zeros_like(weight)))
    together = quantize(stack, quant_type, absmax)
    unpacked = dequantize(together, torch.float32)
    assert together.shape == stack.shape
    for i, matrix in enumerate(stack):
        alone = quantize(matrix, quant_type, absmax)
        assert_same_bits(together.packed[i], alone.packed)
        assert_same_bits(together.absmax[i], alone.absmax)
        if alone.nested is not None:
            assert together.nested is not None
            assert_same_bits(together.nested.absmax[i], alone.nested.absmax)
            assert_same_bits(together.nested.offset[i], alone.nested.offset)
        assert torch.equal(unpacked[i], dequantize(alone, torch.float32))


@given(weights(), TYPES, st.sampled_from([torch.bfloat16, torch.float16]))
@settings(max_examples=40)
def test_lower_precision_is_float32_rounded_once(
    weight: Tensor, quant_type: QuantType, dtype: torch.dtype
) -> None:
    """Dequantizing to bfloat16 or float16 rounds code x absmax and nothing before it."""
    q = quantize(weight, quant_type, "bfloat16")
    assert_same_bits(dequantize(q, dtype), dequantize(q, torch.float32).to(dtype))


def test_large_matrices_are_computed_in_pieces() -> None:
    """More weights than are computed at once give what bitsandbytes gives; so does `out`."""
    weight = torch.randn(1100, 8192)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    q = quantize(weight, "nf4", "nested")
    assert_same_bits(q.packed, packed)
    out = torch.empty_like(weight)
    assert dequantize(q, torch.float32, out) is out
    assert torch.equal(out, bnb.dequantize_4bit(packed, state))
    assert q.nbytes == 1100 * 8192 // 2 + 1100 * 128 + 550 * 4 + (16 + 256 + 1) * 4
