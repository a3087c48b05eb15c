"""The order of 4-bit weights in memory: tiles of 16 rows by 64 columns.

A warp reads a tile of codes as 512 bytes in a row, 16 bytes a lane, and holds what one matrix
instruction after the other multiplies. A tile of absmax has 16 rows by 256 columns, which are 4
quantization groups. The order is a permutation: a tensor keeps its shape and dtype. Letters: N
rows, K columns.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

ROWS, HALF = 16, 8
"""Rows of a tile, and of half a tile: a lane has a row of either half."""
COLUMNS = 256
"""K must be a multiple of this, or absmax does not fill its tiles."""


def fits(out_features: Sequence[int], in_features: int, *, interleaved: bool) -> bool:
    """Whether tiles hold a matrix whose parts have `out_features` rows and `in_features` columns.

    Each part fills whole tiles, or, `interleaved`, one half of each tile of two parts.
    """
    if interleaved and len(out_features) != 2:
        return False
    rows = HALF if interleaved else ROWS
    return in_features % COLUMNS == 0 and not any(size % rows for size in out_features)


def code_rows(tiles: Tensor) -> Tensor:
    """Codes in tiles, uint8 `[..., N, K / 2]`, seen by rows: int32 `[N / 16, 2, 8, K / 64, 2, 4]`.

    N counts the rows of the whole stack. The result shares the memory; an element has 8 columns.
    In memory they lie as `[N / 16, K / 64, 32, 16]`: lane 4g + t of the 32 has rows g and g + 8,
    and of each columns 8t to 8t + 7, then 32 + 8t to 32 + 8t + 7, two columns a byte.
    """
    lanes = tiles.view(torch.int32).view(-1, tiles.shape[-1] // 32, 8, 4, 2, 2)
    # From tile, block, g, t, half of rows, half of columns.
    return lanes.permute(0, 4, 2, 1, 5, 3)


def absmax_rows(tiles: Tensor) -> Tensor:
    """absmax in tiles, `[..., N, K / 64]`, seen by rows: `[N / 16, 2, 8, K / 256, 4]`.

    The result shares the memory, where they lie as `[N / 16, K / 256, 8, 4, 2]`: of each g four
    groups, and of each group rows g and g + 8.
    """
    lanes = tiles.view(-1, tiles.shape[-1] // 4, 8, 4, 2)
    return lanes.permute(0, 4, 2, 1, 3)


def codes_to_tiles(packed: Tensor) -> Tensor:
    """uint8 `[..., N, K / 2]` in bitsandbytes' order -> in tiles."""
    tiles = torch.empty_like(packed, memory_format=torch.contiguous_format)
    by_rows = code_rows(tiles)
    by_rows.copy_(packed.contiguous().view(torch.int32).view(by_rows.shape))
    return tiles


def codes_from_tiles(tiles: Tensor) -> Tensor:
    """The inverse of `codes_to_tiles`."""
    return code_rows(tiles).contiguous().view(torch.uint8).view(tiles.shape)


def absmax_to_tiles(absmax: Tensor) -> Tensor:
    """`[..., N, K / 64]` -> in tiles."""
    tiles = torch.empty_like(absmax, memory_format=torch.contiguous_format)
    by_rows = absmax_rows(tiles)
    by_rows.copy_(absmax.reshape(by_rows.shape))
    return tiles


def absmax_from_tiles(tiles: Tensor) -> Tensor:
    """The inverse of `absmax_to_tiles`."""
    return absmax_rows(tiles).reshape(tiles.shape)


def pairs_of(code: Tensor) -> Tensor:
    """The values of each byte's two codes as int32 `[256]`, from the 16 code values.

    The first column's value, of the high bits, is the bf16 in the low half.
    """
    bits = code.detach().cpu().to(torch.bfloat16).view(torch.int16).to(torch.int32) & 0xFFFF
    byte = torch.arange(256)
    return (bits[byte & 15] << 16) | bits[byte >> 4]
