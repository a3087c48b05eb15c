# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""What `nf4_decode.py` launches: the Triton kernels of products with 4-bit weights.

A program takes a tile of weight rows and a tile of tokens through K, or its part of it, 64 at a
time: a block's codes become values in registers, are multiplied with the even and the odd numbers
of the activations, and the sums are scaled by the block's absmax. Counts that change with the batch
are not specialised on, so that few variants are compiled.
"""

import triton
import triton.language as tl

from serve_app.model.kernels.nf4_ptx import CONSTRAINTS, DECODE

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
def _sums(
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
    first_block,
    groups,
    HAS_PTX: tl.constexpr,
    BLOCKS: tl.constexpr,
    NESTED: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """`[ROWS, TILE]`: weight rows `row` of `expert` times rows `x_rows` of x, in blocks `begin` to
    `end` of 64."""
    j = tl.arange(0, 32)
    is_row = row < N
    lines = expert.to(tl.int64) * N + row
    codes_at = packed + lines[:, None] * (K // 2) + j[None, :]
    even_at = x + x_rows.to(tl.int64)[None, :] * K + j[:, None]
    scales_at = absmax + lines * (K // 64)
    if NESTED:
        offset = tl.load(nested_offset + lines, mask=is_row, other=0.0)
        number = tl.load(first_block + row, mask=is_row, other=0)
    total = tl.zeros([ROWS, TILE], tl.float32)
    for some in range(begin, end, BLOCKS):
        for block in tl.static_range(BLOCKS):
            block += some
            bytes4 = tl.load(codes_at + block * 32, mask=is_row[:, None], other=0)
            even = tl.load(even_at + block * 32, mask=is_live[None, :], other=0.0)
            odd = tl.load(even_at + K // 2 + block * 32, mask=is_live[None, :], other=0.0)
            scale = tl.load(scales_at + block, mask=is_row, other=0)
            if NESTED:
                group = expert * groups + (number + block) // 256
                of_group = tl.load(nested_absmax + group, mask=is_row, other=0.0)
                scale = tl.load(nested_code + scale.to(tl.int32)) * of_group + offset
            high, low = values_of(bytes4, code, low01, low23, high01, high23, HAS_PTX)
            part = tl.dot(high, even, input_precision="ieee")
            part = tl.dot(low, odd, part, input_precision="ieee")
            total += part * scale.to(tl.float32)[:, None]
    return total


@triton.jit(do_not_specialize=["tokens"])
def dense_kernel(
    x,
    out,
    tokens,
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
    first_block,
    groups,
    HAS_PTX: tl.constexpr,
    BLOCKS: tl.constexpr,
    NESTED: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    split, is_live = tl.program_id(2), token < tokens
    share = tl.cdiv(K // 64, SPLIT_K)
    total = _sums(
        x,
        token,
        is_live,
        split * 0,
        row,
        split * share,
        tl.minimum(split * share + share, K // 64),
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
        first_block,
        groups,
        HAS_PTX,
        BLOCKS,
        NESTED,
        N,
        K,
        ROWS,
        TILE,
    )
    at = out + (split.to(tl.int64) * tokens + token[None, :]) * N + row[:, None]
    tl.store(at, total, mask=is_live[None, :] & (row < N)[:, None])


@triton.jit
def gate_up_kernel(
    x,
    order,
    starts,
    out,
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
    first_block,
    groups,
    HAS_PTX: tl.constexpr,
    BLOCKS: tl.constexpr,
    NESTED: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    TOP_K: tl.constexpr,
):
    expert = tl.program_id(2)
    first, last = tl.load(starts + expert), tl.load(starts + expert + 1)
    place = first + tl.program_id(0) * TILE + tl.arange(0, TILE)
    if first + tl.program_id(0) * TILE >= last:
        return
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_live = place < last
    token = tl.load(order + place, mask=is_live, other=0) // TOP_K
    total = _sums(
        x,
        token,
        is_live,
        expert,
        row,
        0,
        K // 64,
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
        first_block,
        groups,
        HAS_PTX,
        BLOCKS,
        NESTED,
        N,
        K,
        ROWS,
        TILE,
    )
    # Rows are 8 of gate, 8 of up, and so on.
    pairs = tl.permute(tl.reshape(total, [ROWS // 16, 2, 8, TILE]), [0, 2, 3, 1])
    gate, up = tl.split(pairs)
    inner = tl.reshape(gate * tl.sigmoid(gate) * up, [ROWS // 2, TILE])
    column = tl.program_id(1) * (ROWS // 2) + tl.arange(0, ROWS // 2)
    halved = (column % 2) * (N // 4) + column // 2
    at = out + place.to(tl.int64)[None, :] * (N // 2) + halved[:, None]
    is_there = is_live[None, :] & (column < N // 2)[:, None]
    tl.store(at, inner.to(out.dtype.element_ty), mask=is_there)


@triton.jit(do_not_specialize=["entries"])
def down_kernel(
    x,
    order,
    starts,
    shares,
    out,
    entries,
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
    first_block,
    groups,
    HAS_PTX: tl.constexpr,
    BLOCKS: tl.constexpr,
    NESTED: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    expert, split = tl.program_id(2) // SPLIT_K, tl.program_id(2) % SPLIT_K
    first, last = tl.load(starts + expert), tl.load(starts + expert + 1)
    place = first + tl.program_id(0) * TILE + tl.arange(0, TILE)
    if first + tl.program_id(0) * TILE >= last:
        return
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_live = place < last
    share = tl.cdiv(K // 64, SPLIT_K)
    total = _sums(
        x,
        place,
        is_live,
        expert,
        row,
        split * share,
        tl.minimum(split * share + share, K // 64),
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
        first_block,
        groups,
        HAS_PTX,
        BLOCKS,
        NESTED,
        N,
        K,
        ROWS,
        TILE,
    )
    entry = tl.load(order + place, mask=is_live, other=0)
    total *= tl.load(shares + entry, mask=is_live, other=0.0)[None, :]
    at = out + (split.to(tl.int64) * entries + entry[None, :]) * N + row[:, None]
    tl.store(at, total, mask=is_live[None, :] & (row < N)[:, None])
