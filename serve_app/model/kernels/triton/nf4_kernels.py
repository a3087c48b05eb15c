# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""The Triton kernels of products with 4-bit weights; `nf4_decode.py` launches them.

A program finds the tokens and the expert of its tile, computes `nf4_sums.sums`, and stores the
result. `do_not_specialize` names counts that change with the batch, for which Triton would compile
further variants. The arguments from `packed` to `K` describe the weights
(`nf4_decode.Packed.arguments`).
"""

import triton
import triton.language as tl

from serve_app.model.kernels.triton.nf4_sums import sums


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
    HAS_PTX: tl.constexpr,
    GROUPS: tl.constexpr,
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
    total = sums(
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
        HAS_PTX,
        GROUPS,
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
    HAS_PTX: tl.constexpr,
    GROUPS: tl.constexpr,
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
    total = sums(
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
        HAS_PTX,
        GROUPS,
        N,
        K,
        ROWS,
        TILE,
    )
    # Rows are 8 of gate, 8 of up, and so on.
    pairs = tl.permute(tl.reshape(total, [ROWS // 16, 2, 8, TILE]), [0, 2, 3, 1])
    gate, up = tl.split(pairs)
    activated = tl.reshape(gate * tl.sigmoid(gate) * up, [ROWS // 2, TILE])
    column = tl.program_id(1) * (ROWS // 2) + tl.arange(0, ROWS // 2)
    at = out + place.to(tl.int64)[None, :] * (N // 2) + column[:, None]
    is_there = is_live[None, :] & (column < N // 2)[:, None]
    tl.store(at, activated.to(out.dtype.element_ty), mask=is_there)


@triton.jit(do_not_specialize=["entries"])
def down_kernel(
    x,
    order,
    starts,
    topk_weights,
    out,
    entries,
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
    total = sums(
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
        HAS_PTX,
        GROUPS,
        N,
        K,
        ROWS,
        TILE,
    )
    entry = tl.load(order + place, mask=is_live, other=0)
    total *= tl.load(topk_weights + entry, mask=is_live, other=0.0)[None, :]
    at = out + (split.to(tl.int64) * entries + entry[None, :]) * N + row[:, None]
    tl.store(at, total, mask=is_live[None, :] & (row < N)[:, None])
