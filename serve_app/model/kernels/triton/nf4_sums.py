# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Functions that the Triton kernels of 4-bit weights share: decoding codes, and sums of products.

`sums` multiplies a tile of weight rows by a tile of tokens, one quantization group of 64 columns
at a time. It decodes the group's codes in registers. A byte has the codes of two adjacent columns,
so the high nibbles are multiplied by the activations with even index, and the low nibbles by those
with odd index. Then it scales the sum by the group's absmax. Codes and absmax are in tiles
(`kernels/cuda/tiles.py`, with an example).
"""

import triton
import triton.language as tl

from serve_app.model.kernels.triton.nf4_ptx import CONSTRAINTS, DECODE

_CONSTRAINTS, _PTX = tl.constexpr(CONSTRAINTS), tl.constexpr(DECODE)


@triton.jit
def values_of(bytes4, code, low01, low23, high01, high23, HAS_PTX: tl.constexpr):
    """Returns the values of the bytes' high nibbles and low nibbles, in the dtype of `code`."""
    if HAS_PTX:
        # The words of the planes are passed in pairs, because a kernel's arguments are limited.
        wide = tl.int64
        low0, low1 = tl.cast(low01, tl.int32), tl.cast(tl.cast(low01, wide) >> 32, tl.int32)
        low2, low3 = tl.cast(low23, tl.int32), tl.cast(tl.cast(low23, wide) >> 32, tl.int32)
        high0, high1 = tl.cast(high01, tl.int32), tl.cast(tl.cast(high01, wide) >> 32, tl.int32)
        high2, high3 = tl.cast(high23, tl.int32), tl.cast(tl.cast(high23, wide) >> 32, tl.int32)
        return tl.inline_asm_elementwise(
            _PTX,
            _CONSTRAINTS,
            [bytes4, low0, low1, low2, low3, high0, high1, high2, high3],
            dtype=(code.dtype.element_ty, code.dtype.element_ty),
            is_pure=True,
            pack=4,
        )
    else:
        high = tl.load(code + (bytes4 >> 4).to(tl.int32))
        return high, tl.load(code + (bytes4 & 15).to(tl.int32))


@triton.jit
def row_in_tiles(line, K: tl.constexpr):
    """Returns the offsets at which row `line` of a stack of matrices begins in codes and in absmax;
    see `tiles.py`."""
    tile, g, half = line // 16, line % 8, line // 8 % 2
    return tile * (K * 8) + g * 64 + half * 8, tile * (K // 4) + g * 8 + half


@triton.jit
def byte_in_tile(m):
    """Returns the offset of byte m (0 to 31, in the order of memory) of a row of a tile from the
    row's first byte, and the first of the byte's two columns."""
    return m // 8 * 16 + m % 8, m // 4 % 2 * 32 + m // 8 * 8 + m % 4 * 2


@triton.jit
def absmax_in_tile(group):
    """Returns the offset of a quantization group's absmax from the first one of its row."""
    return group // 4 * 64 + group % 4 * 2


@triton.jit
def sums(
    x,
    x_rows,
    is_live,
    expert,
    row,
    begin,
    end,
    packed,
    absmax,
    code,
    low01,
    low23,
    high01,
    high23,
    HAS_PTX: tl.constexpr,
    GROUPS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Returns weight[expert][row] @ x[x_rows].T, float32 `[ROWS, TILE]`, summed over the
    quantization groups `begin` to `end` (exclusive)."""
    at, column = byte_in_tile(tl.arange(0, 32))
    is_row = row < N
    codes_of_row, absmax_of_row = row_in_tiles(expert.to(tl.int64) * N + row, K)
    codes_at = packed + codes_of_row[:, None] + at[None, :]
    scales_at = absmax + absmax_of_row
    even_at = x + x_rows.to(tl.int64)[None, :] * K + column[:, None]
    total = tl.zeros([ROWS, TILE], tl.float32)
    for first_group in range(begin, end, GROUPS):
        for group in tl.static_range(GROUPS):
            group += first_group
            bytes4 = tl.load(codes_at + group * 512, mask=is_row[:, None], other=0)
            even = tl.load(even_at + group * 64, mask=is_live[None, :], other=0.0)
            odd = tl.load(even_at + group * 64 + 1, mask=is_live[None, :], other=0.0)
            scale = tl.load(scales_at + absmax_in_tile(group), mask=is_row, other=0)
            high, low = values_of(bytes4, code, low01, low23, high01, high23, HAS_PTX)
            part = tl.dot(high, even, input_precision="ieee")
            part = tl.dot(low, odd, part, input_precision="ieee")
            total += part * scale.to(tl.float32)[:, None]
    return total
