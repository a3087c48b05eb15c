# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Decode attention over the paged KV cache on a GPU, in Triton: one new token per sequence.

The result equals that of `attention.py` up to rounding in the cache's dtype. The first launch
computes parts of each context (splits) for all query heads that share a KV head; the second one
combines the splits in their order. The length of a split depends only on the context's length, so a
sequence gets the same bits in any batch. Example: a context of 300 tokens has splits of 128, 128
and 44 tokens, and a context of 8,192 has 32 splits of 256. The launches read everything that
changes between steps on the device, so a CUDA graph can contain them.

On an H200 the two launches take 5.9 and 2.3 us for a layer of Mixtral 8x7B with one sequence of 512
tokens. Split lengths, `NUM_PROGRAMS`, tile sizes and stages are not tuned.

Letters: B rows, H query heads, K KV heads, G = H / K, D head_dim, S splits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from serve_app.model.footprint import MAX_SPLITS

MIN_SPLIT = 128
"""Minimum number of tokens of a split, so that a split writes less than a sixteenth of the bytes
that it reads. Contexts longer than `MAX_SPLITS * MIN_SPLIT` have longer splits."""
TILE = 64
"""Number of context tokens that a program computes at once."""
LOG2_E = 1.4426950408889634
NUM_PROGRAMS = 1024
"""Approximate number of programs of a launch. The n programs of one row and KV head compute every
nth split each."""


class PagedAttention:
    """Attention of at most `max_rows` decodes, with the memory for the results of their splits."""

    def __init__(self, num_heads: int, layer_keys: Tensor, window: int | None, max_rows: int):
        """`layer_keys` is one layer's keys `[num_blocks, block_size, K, D]`."""
        self.num_heads, self.window = num_heads, window or 0
        _, self.block_size, self.num_kv_heads, self.head_dim = layer_keys.shape
        splits, device = (max_rows, num_heads, MAX_SPLITS), layer_keys.device
        self.sums = torch.empty(*splits, self.head_dim, dtype=torch.float32, device=device)
        self.stats = torch.empty(*splits, 2, dtype=torch.float32, device=device)

    def __call__(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        tables: Tensor,
        context_lens: Tensor,
        out: Tensor,
    ) -> None:
        """Fills `out` `[B, H * D]` from `queries` `[B, H, D]`, both of the cache's dtype.

        `tables` is int32 `[B, max_blocks]`. `context_lens` is int32 `[B]` and includes the new
        tokens. Padding rows (context length 0) get zeros.
        """
        rows, group = len(queries), self.num_heads // self.num_kv_heads
        programs = max(1, min(MAX_SPLITS, NUM_PROGRAMS // (rows * self.num_kv_heads)))
        _attend[(rows, self.num_kv_heads, programs)](
            *(queries, keys, values, tables, context_lens, self.sums, self.stats),
            *(self.head_dim**-0.5 * LOG2_E, tables.stride(0), programs),
            **dict(H=self.num_heads, K=self.num_kv_heads, D=self.head_dim, G=group),
            **dict(ROWS=max(16, triton.next_power_of_2(group)), BLOCK=self.block_size),
            **dict(WINDOW=self.window, TILE=TILE),
            **dict(MAX_SPLITS=MAX_SPLITS, MIN_SPLIT=MIN_SPLIT),
            num_warps=4,
            num_stages=2,
        )
        _combine[(rows, self.num_heads)](
            *(context_lens, self.sums, self.stats, out),
            **dict(H=self.num_heads, D=self.head_dim, WINDOW=self.window, TILE=TILE),
            **dict(MAX_SPLITS=MAX_SPLITS, MIN_SPLIT=MIN_SPLIT),
            num_warps=4,
        )


@triton.jit
def _span(
    lens,
    row,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
):
    """Returns the first token and the end of a row's context, the number of tokens of a split, and
    the number of splits."""
    end = tl.load(lens + row)
    first = end * 0
    if WINDOW > 0:
        first = tl.maximum(end - WINDOW, 0)
    size = tl.maximum(tl.cdiv(tl.cdiv(end - first, MAX_SPLITS), TILE) * TILE, MIN_SPLIT)
    return first, end, size, tl.cdiv(end - first, size)


@triton.jit(do_not_specialize=["programs", "table_stride"])
def _attend(
    queries,
    keys,
    values,
    tables,
    lens,
    sums,
    stats,
    scale,
    table_stride,
    programs,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
):
    """Computes every `programs`th split of one row and KV head, from split `program_id(2)` on.

    Stores the weighted sums of values, the largest score, and the sum of exponentials.
    """
    row, kv_head = tl.program_id(0), tl.program_id(1)
    first, end, size, count = _span(lens, row, WINDOW, TILE, MAX_SPLITS, MIN_SPLIT)
    g, d, t = tl.arange(0, ROWS), tl.arange(0, D), tl.arange(0, TILE)
    heads = row.to(tl.int64) * H + kv_head * G + g
    is_head = g < G
    q = tl.load(queries + heads[:, None] * D + d[None, :], mask=is_head[:, None], other=0.0)
    for split in range(tl.program_id(2), count, programs):
        begin = first + split * size
        stop = tl.minimum(begin + size, end)
        best = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, D], tl.float32)
        for start in range(begin, stop, TILE):
            place = start + t
            is_there = place < stop
            block = tl.load(tables + row * table_stride + place // BLOCK, mask=is_there, other=0)
            slot = block.to(tl.int64) * BLOCK + place % BLOCK
            where = (slot[:, None] * K + kv_head) * D + d[None, :]
            k = tl.load(keys + where, mask=is_there[:, None], other=0.0)
            v = tl.load(values + where, mask=is_there[:, None], other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            scores = tl.where(is_there[None, :], scores, float("-inf"))
            new_best = tl.maximum(best, tl.max(scores, 1))
            weights = tl.exp2(scores - new_best[:, None])
            alpha = tl.exp2(best - new_best)
            total = total * alpha + tl.sum(weights, 1)
            acc = acc * alpha[:, None]
            acc += tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            best = new_best
        at = heads * MAX_SPLITS + split
        tl.store(sums + at[:, None] * D + d[None, :], acc, mask=is_head[:, None])
        tl.store(stats + at * 2, best, mask=is_head)
        tl.store(stats + at * 2 + 1, total, mask=is_head)


@triton.jit
def _combine(
    lens,
    sums,
    stats,
    out,
    H: tl.constexpr,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
):
    """Combines the splits of one query head of a row: the second half of an online softmax.

    Example: a split with the largest score 3 and the sum of exponentials 2, and one with 5 and 4.
    The common largest score is 5. In base 2 the first split's weight is 2 ** (3 - 5) = 1/4, so the
    result is (1/4 * first sum of values + second sum of values) / (1/4 * 2 + 4).
    """
    row, head = tl.program_id(0), tl.program_id(1)
    _, _, _, count = _span(lens, row, WINDOW, TILE, MAX_SPLITS, MIN_SPLIT)
    s, d = tl.arange(0, MAX_SPLITS), tl.arange(0, D)
    at = (row.to(tl.int64) * H + head) * MAX_SPLITS + s
    is_there = s < count
    best = tl.load(stats + at * 2, mask=is_there, other=float("-inf"))
    total = tl.load(stats + at * 2 + 1, mask=is_there, other=0.0)
    acc = tl.load(sums + at[:, None] * D + d[None, :], mask=is_there[:, None], other=0.0)
    max_score = tl.where(count > 0, tl.max(best, 0), 0.0)
    weights = tl.where(is_there, tl.exp2(best - max_score), 0.0)
    exp_sum = tl.sum(weights * total, 0)
    result = tl.sum(acc * weights[:, None], 0) / tl.where(count > 0, exp_sum, 1.0)
    at = out + (row.to(tl.int64) * H + head) * D + d
    tl.store(at, result.to(out.dtype.element_ty))
