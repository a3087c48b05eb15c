# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Routes the tokens of prompts to experts on a GPU, in Triton: one launch for any number of tokens.

A program orders the entries of `ROWS` adjacent tokens. It reads the router logits of all tokens, to
count the entries of each expert before its own entries. For 4,096 tokens of Mixtral these are 64 KB
from the L2 cache. The program uses no atomic additions, so the order is always the same.

The kernel compiles for compute capabilities 8.0, 9.0 and 12.0, and ran on an H200 (9.0).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 512
"""Number of tokens that a program reads together."""
LARGEST = tl.constexpr(1e38)
"""Router logits with a larger absolute value count as not finite."""


def route_prompts(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Chooses each token's experts by its router logits `[T, E]`.

    Returns `order`, `starts` and `topk_weights`. The entry t * k + j is token t's jth expert.
    `order` int32 `[T * k]` has the entries sorted by expert, then by token; those of expert e are
    `order[starts[e] : starts[e + 1]]`, with `starts` int32 `[E + 1]`. `topk_weights` float32
    `[T * k]` has, for each entry, the softmax over its token's k largest logits, or NaN if one of
    the token's logits is not finite. `nf4_decode.gate_up` has an example.
    """
    tokens, experts = logits.shape
    order = torch.empty(tokens * top_k, dtype=torch.int32, device=logits.device)
    topk_weights = torch.empty(tokens * top_k, dtype=torch.float32, device=logits.device)
    starts = torch.empty(experts + 1, dtype=torch.int32, device=logits.device)
    _route_prompts[(triton.cdiv(tokens, ROWS),)](
        *(logits, order, starts, topk_weights, tokens),
        **dict(EXPERTS=experts, WIDTH=triton.next_power_of_2(experts), TOP_K=top_k, ROWS=ROWS),
        num_warps=8,
    )
    return order, starts, topk_weights


@triton.jit
def _scores(logits, t, tokens, EXPERTS: tl.constexpr, WIDTH: tl.constexpr):
    """Returns the logits of tokens `t` `[ROWS]`, float32 `[ROWS, WIDTH]`, and each token's number
    of logits that are not finite.

    Logits that are not finite are replaced by -LARGEST, so that each token still gets k different
    experts. With NaN, threads would disagree about the largest logit and write to wrong addresses.
    """
    e = tl.arange(0, WIDTH)
    is_there = (t < tokens)[:, None] & (e < EXPERTS)[None, :]
    at = t.to(tl.int64)[:, None] * EXPERTS + e[None, :]
    score = tl.load(logits + at, mask=is_there, other=0.0).to(tl.float32)
    is_finite = (score > -LARGEST) & (score < LARGEST)
    num_invalid = tl.sum((is_there & ~is_finite).to(tl.int32), 1)
    score = tl.where(is_finite, score, -LARGEST)
    return tl.where((e < EXPERTS)[None, :], score, float("-inf")), num_invalid


@triton.jit
def _hits(score, is_row, TOP_K: tl.constexpr, WIDTH: tl.constexpr):
    """Returns int32 `[ROWS, WIDTH]`: 1 for the `TOP_K` largest logits of each row in `is_row`,
    otherwise 0."""
    e = tl.arange(0, WIDTH)
    hits = (score != score).to(tl.int32)
    for _ in tl.static_range(TOP_K):
        is_best = e[None, :] == tl.argmax(score, 1)[:, None]
        hits += (is_best & is_row[:, None]).to(tl.int32)
        score = tl.where(is_best, float("-inf"), score)
    return hits


@triton.jit(do_not_specialize=["tokens"])
def _route_prompts(
    logits,
    order,
    starts,
    topk_weights,
    tokens,
    EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
):
    t, e = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    own = tl.program_id(0) * ROWS
    sizes, before = tl.zeros([WIDTH], tl.int32), tl.zeros([WIDTH], tl.int32)
    for first in range(0, tokens, ROWS):
        score, _ = _scores(logits, first + t, tokens, EXPERTS, WIDTH)
        counts = tl.sum(_hits(score, first + t < tokens, TOP_K, WIDTH), 0)
        sizes += counts
        before += tl.where(first < own, counts, 0)
    ends = tl.cumsum(sizes, 0)
    token = own + t
    is_row = token < tokens
    score, num_invalid = _scores(logits, token, tokens, EXPERTS, WIDTH)
    hits = _hits(score, is_row, TOP_K, WIDTH)
    place = tl.cumsum(hits, 0) - hits + (ends - sizes + before)[None, :]
    # The softmax over the chosen logits equals the softmax over all logits, renormalized.
    top = tl.max(score, 1)
    total = tl.sum(tl.where(hits > 0, tl.exp(score - top[:, None]), 0.0), 1)
    total = tl.where(is_row, total, 1.0)
    for k in tl.static_range(TOP_K):
        is_best = e[None, :] == tl.argmax(score, 1)[:, None]
        topk_weight = tl.exp(tl.max(score, 1) - top) / total
        topk_weight = tl.where(num_invalid > 0, float("nan"), topk_weight)
        entry = token * TOP_K + k
        tl.store(topk_weights + entry, topk_weight, mask=is_row)
        at = tl.sum(tl.where(is_best, place, 0), 1)
        tl.store(order + at, entry, mask=is_row)
        score = tl.where(is_best, float("-inf"), score)
    if tl.program_id(0) == 0:
        tl.store(starts + 1 + e, ends, mask=e < EXPERTS)
        tl.store(starts + e, 0, mask=e == 0)
