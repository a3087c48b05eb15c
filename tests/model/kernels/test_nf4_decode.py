"""The Triton 4-bit products, run by its interpreter, against dequantized plain products."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from serve_app.model.kernels.kernel_check import relative_errors
from serve_app.model.kernels.triton import nf4_decode
from serve_app.model.kernels.triton.nf4_decode import SPLIT_K, Packed
from serve_app.model.kernels.triton.nf4_unpack import Unpacker
from serve_app.model.quantization import Quantization, QuantType
from serve_app.model.quantize import dequantize
from serve_app.model.quantized_weight import INTERLEAVED_ROWS, Codebook, QuantizedWeight

HIDDEN, INNER, EXPERTS, TOP_K = 256, 256, 4, 2
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}
FORMS = ("torch", "triton")
QUANT_TYPES: tuple[QuantType, ...] = ("nf4", "fp4")


def matrices(
    codes: Codebook, lead: tuple[int, ...], columns: int, rows: tuple[int, ...], seed: int = 0
) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    made = QuantizedWeight(codes, lead, columns, rows, interleaved=len(rows) == 2)
    for expert in range(lead[0]) if lead else [None]:
        for part, count in enumerate(rows):
            weight = torch.randn(count, columns, generator=generator)
            made.load_weight(weight, expert, part)
    return made


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_matrix_of_parts(quant_type: QuantType, dtype: torch.dtype) -> None:
    """q, k and v one above the other, quantized apart, for one token, a few, and two tiles."""
    weights = matrices(Codebook(quant_type), (), HIDDEN, (96, 48, 16))
    plain = dequantize(weights.get(), torch.float32)
    for tokens in (1, 5, 19):
        x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)
        out = torch.full((SPLIT_K, tokens, 160), torch.nan)
        nf4_decode.dense(Packed.from_weight(weights, dtype), x, out)
        assert error(out.sum(0), x.float() @ plain.T) < TOLERANCE[dtype]


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_experts(quant_type: QuantType, dtype: torch.dtype) -> None:
    """Gate, up and down of the experts of each token; some have no token, some two tiles."""
    codes = Codebook(quant_type)
    both = matrices(codes, (EXPERTS,), HIDDEN, (INNER, INNER))
    back = matrices(codes, (EXPERTS,), INNER, (HIDDEN,), seed=1)
    up_weights = dequantize(both.get(), torch.float32)
    down_weights = dequantize(back.get(), torch.float32)
    generator = torch.Generator().manual_seed(2)
    for tokens, few in ((1, EXPERTS), (21, 3)):
        x = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
        ids = torch.stack([torch.randperm(few, generator=generator)[:TOP_K] for _ in range(tokens)])
        shares = torch.rand(tokens * TOP_K, generator=generator)
        order = ids.flatten().argsort(stable=True)
        starts = torch.tensor([int((ids < e).sum()) for e in range(EXPERTS + 1)])
        routing = (order.int(), starts.int())
        inner = torch.full((tokens * TOP_K, INNER), torch.nan, dtype=dtype)
        nf4_decode.gate_up(Packed.from_weight(both, dtype), x, *routing, TOP_K, inner)
        out = torch.full((SPLIT_K, tokens * TOP_K, HIDDEN), torch.nan)
        nf4_decode.down(Packed.from_weight(back, dtype), inner, *routing, shares, TOP_K, out)
        expected = torch.empty(tokens * TOP_K, HIDDEN)
        for expert, (first, last) in enumerate(pairwise(starts.tolist())):
            entries = order[first:last]
            products = x[entries // TOP_K].float() @ up_weights[expert].T
            gate, up = products.view(
                last - first, INNER // INTERLEAVED_ROWS, 2, INTERLEAVED_ROWS
            ).unbind(2)
            mixed = (F.silu(gate) * up).flatten(1) @ down_weights[expert].T
            expected[entries] = mixed * shares[entries, None]
        assert error(out.sum(0), expected) < TOLERANCE[dtype]


def test_a_token_has_the_same_bits_in_any_batch() -> None:
    """Within one size of tile, the sums over K are cut in the same way for every batch."""
    weights = Packed.from_weight(matrices(Codebook("nf4"), (), HIDDEN, (64,)), torch.float32)
    x = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(3))
    whole = torch.empty(SPLIT_K, 9, 64)
    nf4_decode.dense(weights, x, whole)
    alone = torch.empty(SPLIT_K, 1, 64)
    nf4_decode.dense(weights, x[4:5], alone)
    assert torch.equal(alone[:, 0], whole[:, 4])


def test_the_trial_on_a_device_tries_them_too() -> None:
    """The kernel check compares the Triton kernels too, on the same data as the torch forms."""
    how = Quantization("nf4", "bfloat16")
    errors = relative_errors(how, torch.float16, torch.device("cpu"), has_kernels=True)
    products = {f"{what} ({by})" for what in ("linear", "experts") for by in FORMS}
    assert set(errors) == products | {"unpacked (triton)", "attention (triton)"}
    assert max(errors.values()) < 1e-2


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_matrices_are_unpacked(quant_type: QuantType) -> None:
    """One matrix of parts, and some of a stack in any order, equal what `dequantize` returns."""
    codes = Codebook(quant_type)
    for made, index in (
        (matrices(codes, (), HIDDEN, (96, 48, 16)), ()),
        (matrices(codes, (EXPERTS,), HIDDEN, (72, 72)), torch.tensor([3, 0])),
    ):
        expected = dequantize(made.get(index), torch.float32)
        torch.testing.assert_close(Unpacker(torch.float32)(made, index), expected)
