"""The order of weights that the CUDA kernels read."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from serve_app.model.kernels.cuda.tiles import (
    absmax_from_tiles,
    absmax_to_tiles,
    codes_from_tiles,
    codes_to_tiles,
    pairs_of,
)
from serve_app.model.quantize import code_values

stacks = st.lists(st.integers(1, 3), max_size=2)
sizes = st.integers(1, 4)


@given(stacks, sizes, sizes, st.integers(0, 2**32))
def test_tiles_and_back(stack: list[int], rows: int, columns: int, seed: int) -> None:
    """Packing is a permutation without gaps: the inverse gives the same bytes and scales."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(
        0, 256, (*stack, 16 * rows, 128 * columns), generator=generator, dtype=torch.uint8
    )
    absmax = torch.randn(*stack, 16 * rows, 4 * columns, generator=generator).bfloat16()
    codes, scales = codes_to_tiles(packed), absmax_to_tiles(absmax)
    assert (codes.shape, scales.shape) == (packed.shape, absmax.shape)
    assert codes.is_contiguous()
    assert scales.is_contiguous()
    assert torch.equal(codes_from_tiles(codes), packed)
    assert torch.equal(absmax_from_tiles(scales), absmax)


@given(st.integers(0, 63), st.integers(0, 255))
def test_a_weight_lies_where_the_kernels_read_it(row: int, column: int) -> None:
    """By the rule in tiles.cuh: which lane and which of its 16 bytes has a row and column."""
    packed, absmax = torch.zeros(64, 128, dtype=torch.uint8), torch.zeros(64, 4)
    packed[row, column // 2], absmax[row, column // 64] = 1, 1.0
    g, is_lower, in_block = row % 8, row % 16 // 8, column % 64
    t, is_right = in_block % 32 // 8, in_block // 32
    byte = 8 * is_lower + 4 * is_right + in_block % 8 // 2
    codes, scales = codes_to_tiles(packed).view(4, 4, 32, 16), absmax_to_tiles(absmax)
    assert codes[row // 16, column // 64, 4 * g + t, byte] == 1
    assert scales.view(4, 1, 8, 4, 2)[row // 16, 0, g, column // 64, is_lower] == 1.0


def test_the_pairs_of_a_byte() -> None:
    """The high bits are the first column, which is the low half."""
    values = code_values("nf4")
    pairs = pairs_of(values).view(torch.bfloat16).view(256, 2)
    assert torch.equal(pairs[0x3A], values.bfloat16()[[0x3, 0xA]])
