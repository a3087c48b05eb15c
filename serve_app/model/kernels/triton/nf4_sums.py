# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Functions that the Triton kernels of 4-bit weights share: decoding codes, and sums of products.

`sums` multiplies a tile of weight rows with a tile of tokens over K, or a part of K, one
quantization group of 64 at a time: the codes of a group become values in registers, which are
multiplied with the activations of even and of odd index, and the sums are scaled by the group's
absmax.
"""

import triton
import triton.language as tl

from serve_app.model.kernels.triton.nf4_ptx import CONSTRAINTS, DECODE

_CONSTRAINTS, _PTX = tl.constexpr(CONSTRAINTS), tl.constexpr(DECODE)


@triton.jit
def values_of(bytes4, code, low01, low23, high01, high23, HAS_PTX: tl.constexpr):
    """The values of the high and of the low nibbles of bytes, in the dtype of `code`."""
    if HAS_PTX:
        # Words that are the assembly's operands; two in an argument, or there would be too many.
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
    nested_code,
    nested_absmax,
    nested_offset,
    first_group,
    nested_groups,
    HAS_PTX: tl.constexpr,
    GROUPS: tl.constexpr,
    NESTED: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """`[ROWS, TILE]`: weight rows `row` of `expert` times rows `x_rows` of x, over the quantization
    groups `begin` to `end`."""
    j = tl.arange(0, 32)
    is_row = row < N
    lines = expert.to(tl.int64) * N + row
    codes_at = packed + lines[:, None] * (K // 2) + j[None, :]
    even_at = x + x_rows.to(tl.int64)[None, :] * K + j[:, None]
    scales_at = absmax + lines * (K // 64)
    if NESTED:
        offset = tl.load(nested_offset + lines, mask=is_row, other=0.0)
        number = tl.load(first_group + row, mask=is_row, other=0)
    total = tl.zeros([ROWS, TILE], tl.float32)
    for some in range(begin, end, GROUPS):
        for group in tl.static_range(GROUPS):
            group += some
            bytes4 = tl.load(codes_at + group * 32, mask=is_row[:, None], other=0)
            even = tl.load(even_at + group * 32, mask=is_live[None, :], other=0.0)
            odd = tl.load(even_at + K // 2 + group * 32, mask=is_live[None, :], other=0.0)
            scale = tl.load(scales_at + group, mask=is_row, other=0)
            if NESTED:
                nested_group = expert * nested_groups + (number + group) // 256
                nested_scale = tl.load(nested_absmax + nested_group, mask=is_row, other=0.0)
                scale = tl.load(nested_code + scale.to(tl.int32)) * nested_scale + offset
            high, low = values_of(bytes4, code, low01, low23, high01, high23, HAS_PTX)
            part = tl.dot(high, even, input_precision="ieee")
            part = tl.dot(low, odd, part, input_precision="ieee")
            total += part * scale.to(tl.float32)[:, None]
    return total
