# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""The Triton kernels of a decode step besides products and attention, one launch each.

`add_norm` adds the parts of the previous product to the hidden state and normalizes it.
`rope_write` applies the rotary embedding and fills the KV cache. `route` chooses the experts of
each row. Padding rows have context length 0: they write no keys or values and have no experts.
Parts are added in their order, so the result of a row does not depend on other rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def add_norm(
    x: Tensor,
    parts: Tensor | None,
    context_lens: Tensor,
    weight: Tensor,
    eps: float,
) -> Tensor:
    """Adds `parts` to `x` `[B, H]` in place, and returns the RMSNorm of `x` (arXiv 1910.07467).

    `parts` `[S, B * C, H]` has S * C summands for every row; None adds nothing. Nothing is added to
    padding rows.
    """
    rows, size = x.shape
    y = torch.empty_like(x)
    splits = 0 if parts is None else len(parts)
    summands = 0 if parts is None else parts.shape[1] // rows
    _add_norm[(rows,)](
        *(x, x if parts is None else parts, context_lens, weight, y, rows, eps),
        **dict(SIZE=size, WIDTH=triton.next_power_of_2(size), SPLITS=splits, SUMMANDS=summands),
        num_warps=8 if size >= 2048 else 4,
    )
    return y


def rope_write(
    qkv: Tensor,
    rows: tuple[Tensor, Tensor, Tensor],
    cos: Tensor,
    sin: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
) -> None:
    """Fills `queries` `[B, H, D]`, `keys` and `values` from `qkv` `[S, B, (H + 2 K) * D]`.

    `rows` has positions and slots, int64 `[B]` each, and context lengths, int32 `[B]`. `cos` and
    `sin` are the tables of `Rope`.
    """
    batch, heads, head_dim = queries.shape
    kv_heads = keys.shape[2]
    _rope_write[(batch, heads + 2 * kv_heads)](
        *(qkv, *rows, cos, sin, queries, keys, values, batch),
        **dict(SPLITS=len(qkv), H=heads, K=kv_heads, D=head_dim),
        num_warps=1,
    )


def route(logits: Tensor, context_lens: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `order`, `starts` and `topk_weights` of `nf4_decode` for router logits `[B, E]`."""
    rows, experts = logits.shape
    order = torch.empty(rows * top_k, dtype=torch.int32, device=logits.device)
    topk_weights = torch.empty(rows * top_k, dtype=torch.float32, device=logits.device)
    starts = torch.empty(experts + 1, dtype=torch.int32, device=logits.device)
    _route[(1,)](
        *(logits, context_lens, order, starts, topk_weights, rows),
        **dict(EXPERTS=experts, WIDTH=triton.next_power_of_2(experts), TOP_K=top_k),
        **dict(ROWS=triton.next_power_of_2(rows)),
        num_warps=4,
    )
    return order, starts, topk_weights


@triton.jit(do_not_specialize=["rows"])
def _add_norm(
    x,
    parts,
    lens,
    weight,
    y,
    rows,
    eps,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    SUMMANDS: tl.constexpr,
):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    is_there = column < SIZE
    value = tl.load(x + row * SIZE + column, mask=is_there, other=0.0).to(tl.float32)
    if SPLITS > 0:
        is_added = is_there & (tl.load(lens + row) > 0)
        added = tl.zeros([WIDTH], tl.float32)
        for summand in tl.static_range(SUMMANDS):
            for split in tl.static_range(SPLITS):
                line = (split * rows + row) * SUMMANDS + summand
                added += tl.load(parts + line * SIZE + column, mask=is_added, other=0.0)
        # The sum is rounded to x's dtype before it is normalized, as in plain torch.
        value = (value + added).to(x.dtype.element_ty)
        tl.store(x + row * SIZE + column, value, mask=is_there)
        value = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / SIZE + eps)
    scaled = value * scale * tl.load(weight + column, mask=is_there, other=0.0).to(tl.float32)
    tl.store(y + row * SIZE + column, scaled.to(y.dtype.element_ty), mask=is_there)


# Positions and slots are views of one tensor at any address, so one variant is compiled for all.
@triton.jit(do_not_specialize=["batch"], do_not_specialize_on_alignment=["positions", "slots"])
def _rope_write(
    qkv,
    positions,
    slots,
    lens,
    cos,
    sin,
    queries,
    keys,
    values,
    batch,
    SPLITS: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, D)
    own, partner = tl.zeros([D], tl.float32), tl.zeros([D], tl.float32)
    for split in tl.static_range(SPLITS):
        start = ((split * batch + row) * (H + 2 * K) + head) * D
        own += tl.load(qkv + start + d).to(tl.float32)
        partner += tl.load(qkv + start + (d + D // 2) % D).to(tl.float32)
    is_live = tl.load(lens + row) > 0
    position, slot = tl.load(positions + row), tl.load(slots + row)
    rotated = own * tl.load(cos + position * D + d).to(tl.float32)
    # `Rope`'s table of sines has the minus sign of the rotation.
    rotated += partner * tl.load(sin + position * D + d).to(tl.float32)
    is_written = d < (D * is_live)
    if head < H:
        tl.store(queries + (row * H + head) * D + d, rotated.to(queries.dtype.element_ty))
    elif head < H + K:
        at = (slot * K + head - H) * D + d
        tl.store(keys + at, rotated.to(keys.dtype.element_ty), mask=is_written)
    else:
        at = (slot * K + head - H - K) * D + d
        tl.store(values + at, own.to(values.dtype.element_ty), mask=is_written)


LARGEST = tl.constexpr(1e38)
"""Router logits with a larger absolute value count as not finite."""


@triton.jit(do_not_specialize=["rows"])
def _route(
    logits,
    lens,
    order,
    starts,
    topk_weights,
    rows,
    EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
):
    t, e = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    is_row, is_expert = t < rows, e < EXPERTS
    is_live = tl.load(lens + t, mask=is_row, other=0) > 0
    is_there = is_row[:, None] & is_expert[None, :]
    score = tl.load(logits + t[:, None] * EXPERTS + e[None, :], mask=is_there, other=float("-inf"))
    score = score.to(tl.float32)
    # A row with logits that are not finite gets NaN weights, but still k different experts. With
    # NaN, threads would disagree about the largest logit and write to wrong addresses.
    is_finite = (score > -LARGEST) & (score < LARGEST)
    num_invalid = tl.sum((is_there & ~is_finite).to(tl.int32), 1)
    score = tl.where(is_finite, score, -LARGEST)
    score = tl.where(is_expert[None, :], score, float("-inf"))
    # The softmax over the chosen logits equals the softmax over all logits, renormalized.
    top = tl.max(score, 1)
    hits = tl.zeros([ROWS, WIDTH], tl.int32)
    total = tl.zeros([ROWS], tl.float32)
    remaining = score
    for _ in tl.static_range(TOP_K):
        best = tl.argmax(remaining, 1)
        is_best = e[None, :] == best[:, None]
        total += tl.exp(tl.max(remaining, 1) - top)
        hits += (is_best & is_live[:, None]).to(tl.int32)
        remaining = tl.where(is_best, float("-inf"), remaining)
    sizes = tl.sum(hits, 0)
    ends = tl.cumsum(sizes, 0)
    place = tl.cumsum(hits, 0) - hits + (ends - sizes)[None, :]
    remaining = score
    for k in tl.static_range(TOP_K):
        best = tl.argmax(remaining, 1)
        is_best = e[None, :] == best[:, None]
        entry = t * TOP_K + k
        topk_weight = tl.where(
            num_invalid > 0, float("nan"), tl.exp(tl.max(remaining, 1) - top) / total
        )
        tl.store(topk_weights + entry, topk_weight, mask=is_row)
        at = tl.sum(tl.where(is_best, place, 0), 1)
        tl.store(order + at, entry, mask=is_live)
        remaining = tl.where(is_best, float("-inf"), remaining)
    tl.store(starts + 1 + e, ends, mask=is_expert)
    tl.store(starts + e, 0, mask=e == 0)
