"""The order in which the CUDA kernels read 4-bit weights: tiles of 16 rows by 64 columns.

A warp reads a tile of codes as 512 bytes in a row, 16 bytes a lane, and holds what one matrix
instruction after the other multiplies. Both orders take the same memory: each function here is a
permutation of its input, and the inverse of its neighbor. Letters: N rows, K columns.
"""

import torch
from torch import Tensor

ROWS, COLUMNS = 16, 64
"""Rows and columns of a tile of codes."""
SCALE_COLUMNS = 256
"""Columns of a tile of absmax, 4 quantization groups."""


def codes_to_tiles(packed: Tensor) -> Tensor:
    """uint8 `[..., N, K / 2]` in bitsandbytes' order -> `[..., N / 16, K / 64, 32, 16]`.

    Lane 4g + t of the 32 has rows g and g + 8: of each columns 8t to 8t + 7, then 32 + 8t to
    32 + 8t + 7, two columns a byte.
    """
    *stack, rows, size = packed.shape
    view = packed.view(*stack, rows // ROWS, 2, 8, size // 32, 2, 4, 4)
    # [tile, half of rows, g, block, half of columns, t, byte]
    ordered = view.movedim((-7, -4, -5, -2, -6, -3, -1), (-7, -6, -5, -4, -3, -2, -1))
    return ordered.reshape(*stack, rows // ROWS, size // 32, 32, 16)


def codes_from_tiles(tiles: Tensor) -> Tensor:
    """The inverse of `codes_to_tiles`."""
    *stack, groups, blocks, _, _ = tiles.shape
    view = tiles.view(*stack, groups, blocks, 8, 4, 2, 2, 4)
    ordered = view.movedim((-7, -6, -5, -4, -3, -2, -1), (-7, -4, -5, -2, -6, -3, -1))
    return ordered.reshape(*stack, groups * ROWS, blocks * 32)


def absmax_to_tiles(absmax: Tensor) -> Tensor:
    """`[..., N, K / 64]` -> `[..., N / 16, K / 256, 8, 4, 2]`: g, block, row g or g + 8."""
    *stack, rows, groups = absmax.shape
    view = absmax.view(*stack, rows // ROWS, 2, 8, groups // 4, 4)
    ordered = view.movedim((-5, -2, -3, -1, -4), (-5, -4, -3, -2, -1))
    return ordered.contiguous()


def absmax_from_tiles(tiles: Tensor) -> Tensor:
    """The inverse of `absmax_to_tiles`."""
    *stack, groups, blocks, _, _, _ = tiles.shape
    ordered = tiles.movedim((-5, -4, -3, -2, -1), (-5, -2, -3, -1, -4))
    return ordered.reshape(*stack, groups * ROWS, blocks * 4)


def pairs_of(code: Tensor) -> Tensor:
    """The values of each byte's two codes as int32 `[256]`, from the 16 code values.

    The first column's value, of the high bits, is the bf16 in the low half.
    """
    bits = code.detach().cpu().to(torch.bfloat16).view(torch.int16).to(torch.int32) & 0xFFFF
    byte = torch.arange(256)
    return (bits[byte & 15] << 16) | bits[byte >> 4]
