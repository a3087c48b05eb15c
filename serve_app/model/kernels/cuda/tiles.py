"""The order of 4-bit weights in memory: tiles of 16 rows by 64 columns.

A tile of codes is 512 adjacent bytes. A warp reads it with one load, 16 bytes per lane, and each
lane then has the values that it needs for the matrix instructions. A tile of absmax has 16 rows by
256 columns, which are 4 quantization groups. Both orders are permutations: a tensor keeps its shape
and dtype. Letters: N rows, K columns.

Lane 4g + t of a warp has rows g and g + 8, with columns 8t to 8t + 7 and 32 + 8t to 32 + 8t + 7 of
each row, two columns per byte:

    bytes 0 to 3     row g       columns 8t to 8t + 7
    bytes 4 to 7     row g       columns 32 + 8t to 32 + 8t + 7
    bytes 8 to 11    row g + 8   columns 8t to 8t + 7
    bytes 12 to 15   row g + 8   columns 32 + 8t to 32 + 8t + 7

Example: row 9, column 70 of a matrix. It is in the tile of rows 0 to 15 and columns 64 to 127, the
second one (70 // 64 = 1), at row 9 = g + 8 with g = 1 and column 6, so t = 0: lane 4. Columns 6 and
7 are the last byte of the lane's bytes 8 to 11. So its byte is 1 * 512 + 4 * 16 + 11 = 587.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

ROWS, HALF = 16, 8
"""Number of rows of a tile, and of half a tile. A lane has one row of each half."""
COLUMNS = 256
"""Number of columns of an absmax tile. K must be a multiple of it."""


def fits(out_features: Sequence[int], in_features: int, *, interleaved: bool) -> bool:
    """Returns whether a matrix can be stored in tiles.

    Its parts have `out_features` rows each, and `in_features` columns. A part must fill whole
    tiles; each of two `interleaved` parts must fill half of every tile.
    """
    if interleaved and len(out_features) != 2:
        return False
    rows = HALF if interleaved else ROWS
    return in_features % COLUMNS == 0 and not any(size % rows for size in out_features)


def code_rows(tiles: Tensor) -> Tensor:
    """Returns a view of codes in tiles in the order of rows.

    `tiles` is uint8 `[..., N, K / 2]`. The result is int32 `[N / 16, 2, 8, K / 64, 2, 4]`, where N
    counts the rows of the whole stack. An element has the codes of 8 adjacent columns.
    """
    lanes = tiles.view(torch.int32).view(-1, tiles.shape[-1] // 32, 8, 4, 2, 2)
    # In memory: tile of rows, tile of columns, g, t, half of the rows, half of the columns.
    return lanes.permute(0, 4, 2, 1, 5, 3)


def absmax_rows(tiles: Tensor) -> Tensor:
    """Returns a view of absmax in tiles in the order of rows.

    `tiles` is `[..., N, K / 64]`, and the result `[N / 16, 2, 8, K / 256, 4]`.
    """
    # In memory: tile of rows, tile of columns, g, quantization group, half of the rows.
    lanes = tiles.view(-1, tiles.shape[-1] // 4, 8, 4, 2)
    return lanes.permute(0, 4, 2, 1, 3)


def codes_to_tiles(packed: Tensor) -> Tensor:
    """Returns codes in tiles from codes in bitsandbytes' order, both uint8 `[..., N, K / 2]`."""
    tiles = torch.empty_like(packed, memory_format=torch.contiguous_format)
    by_rows = code_rows(tiles)
    by_rows.copy_(packed.contiguous().view(torch.int32).view(by_rows.shape))
    return tiles


def codes_from_tiles(tiles: Tensor) -> Tensor:
    """Returns codes in bitsandbytes' order: the inverse of `codes_to_tiles`."""
    return code_rows(tiles).contiguous().view(torch.uint8).view(tiles.shape)


def absmax_to_tiles(absmax: Tensor) -> Tensor:
    """Returns absmax in tiles from absmax row by row, both `[..., N, K / 64]`."""
    tiles = torch.empty_like(absmax, memory_format=torch.contiguous_format)
    by_rows = absmax_rows(tiles)
    by_rows.copy_(absmax.reshape(by_rows.shape))
    return tiles


def absmax_from_tiles(tiles: Tensor) -> Tensor:
    """Returns absmax row by row: the inverse of `absmax_to_tiles`."""
    return absmax_rows(tiles).reshape(tiles.shape)


def pairs_of(code: Tensor) -> Tensor:
    """Returns the two bfloat16 values of each of the 256 bytes as int32 `[256]`.

    `code` has the 16 code values. A byte's high nibble is the first column; its value is the low
    half of the int32, and the value of the low nibble is the high half.
    """
    bits = code.detach().cpu().to(torch.bfloat16).view(torch.int16).to(torch.int32) & 0xFFFF
    byte = torch.arange(256)
    return (bits[byte & 15] << 16) | bits[byte >> 4]
