"""The order in which the CUDA kernels read 4-bit weights: tiles of 16 rows by 64 columns.

A warp reads a tile of codes as 512 bytes in a row, 16 bytes a lane, and holds what one matrix
instruction after the other multiplies. Each function here is a permutation and the inverse of its
neighbor; the shape stays what it was, so that the result can take the place of its input. Letters:
N rows, K columns.
"""

import torch
from torch import Tensor

ROWS = 16
"""Rows of a tile; it has 64 columns of codes, or 256 of absmax, which are 4 groups."""


def codes_to_tiles(packed: Tensor) -> Tensor:
    """uint8 `[..., N, K / 2]` in bitsandbytes' order -> in tiles.

    They lie in memory as `[..., N / 16, K / 64, 32, 16]`. Lane 4g + t of the 32 has rows g
    and g + 8: of each columns 8t to 8t + 7, then 32 + 8t to 32 + 8t + 7, two columns a byte.
    """
    rows = packed.reshape(-1, 2, 8, packed.shape[-1] // 32, 2, 4, 4)
    # From tile, half of rows, g, block, half of columns, t, byte.
    return rows.permute(0, 3, 2, 5, 1, 4, 6).reshape(packed.shape)


def codes_from_tiles(tiles: Tensor) -> Tensor:
    """The inverse of `codes_to_tiles`."""
    lanes = tiles.reshape(-1, tiles.shape[-1] // 32, 8, 4, 2, 2, 4)
    return lanes.permute(0, 4, 2, 1, 5, 3, 6).reshape(tiles.shape)


def absmax_to_tiles(absmax: Tensor) -> Tensor:
    """`[..., N, K / 64]` -> in tiles.

    They lie in memory as `[..., N / 16, K / 256, 8, 4, 2]`: of each g four groups, rows g and
    g + 8.
    """
    rows = absmax.reshape(-1, 2, 8, absmax.shape[-1] // 4, 4)
    return rows.permute(0, 3, 2, 4, 1).reshape(absmax.shape)


def absmax_from_tiles(tiles: Tensor) -> Tensor:
    """The inverse of `absmax_to_tiles`."""
    groups = tiles.reshape(-1, tiles.shape[-1] // 4, 8, 4, 2)
    return groups.permute(0, 4, 2, 1, 3).reshape(tiles.shape)


def pairs_of(code: Tensor) -> Tensor:
    """The values of each byte's two codes as int32 `[256]`, from the 16 code values.

    The first column's value, of the high bits, is the bf16 in the low half.
    """
    bits = code.detach().cpu().to(torch.bfloat16).view(torch.int16).to(torch.int32) & 0xFFFF
    byte = torch.arange(256)
    return (bits[byte & 15] << 16) | bits[byte >> 4]
