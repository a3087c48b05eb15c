# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Attention of prefill chunks over the paged KV cache on a GPU, in Triton: one launch for a step.

The result equals that of `attention.py` up to rounding in the cache's dtype. A program computes one
KV head and one item of `chunk_tiles.py`: a few adjacent queries of one chunk, with all query heads
that share the KV head, and their context or a part of it. It reads keys and values through the
block table, without copying them. The host lists the items once per step, and never waits for the
device. If contexts are cut into splits, a second launch combines the splits in their order.

The kernels compile for compute capabilities 8.0, 9.0 and 12.0, and ran on an H200 (9.0).

Letters: T tokens of the batch, H query heads, K KV heads, G = H / K, D head_dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from serve_app.model.batch import Batch
from serve_app.model.kernels.triton.chunk_tiles import ChunkTiles, TileSizes, plan_tiles

ROWS = 128
"""Number of rows of a tile, each a pair of a query and a head; half if head_dim is above 128."""
TILE, SMALL_TILE = 64, 32
"""Number of context tokens that a program computes at once: on GPUs of compute capabilities 9 and
10, and on other GPUs, which have too few registers for 64 tokens."""
LOG2_E = 1.4426950408889634


class PromptAttention:
    """Attention of the chunks of a step."""

    def __init__(self, num_heads: int, layer_keys: Tensor, window: int | None) -> None:
        """`layer_keys` is one layer's keys `[num_blocks, block_size, K, D]`."""
        self._num_heads = num_heads
        _, self._block_size, num_kv_heads, head_dim = layer_keys.shape
        group = triton.next_power_of_2(num_heads // num_kv_heads)
        rows = ROWS if head_dim <= 128 else ROWS // 2
        tile, num_queries = tile_of(layer_keys.device), max(1, rows // group)
        self.sizes = TileSizes(num_queries, group, num_kv_heads, head_dim, tile, window)

    def plan(self, batch: Batch) -> ChunkTiles:
        """Returns the items of a batch; see `plan_tiles`."""
        return plan_tiles(batch, self.sizes)

    def __call__(
        self, queries: Tensor, keys: Tensor, values: Tensor, tiles: ChunkTiles, out: Tensor
    ) -> None:
        """Fills `out` `[T, H * D]` from `queries` `[T, H, D]`, both of the cache's dtype.

        `keys` and `values` `[num_blocks, block_size, K, D]` must contain those of the new tokens.
        """
        sizes = self.sizes
        kv_heads, head_dim = sizes.num_kv_heads, sizes.head_dim
        constants = {"H": self._num_heads, "K": kv_heads, "D": head_dim}
        constants |= {"G": self._num_heads // kv_heads, "GROUP": sizes.group}
        constants |= {"QUERIES": sizes.num_queries}
        _attend_chunks[(kv_heads, len(tiles.items))](
            *(queries, keys, values, tiles.tables, tiles.items, out, tiles.sums, tiles.stats),
            *(head_dim**-0.5 * LOG2_E, tiles.tables.stride(0)),
            **constants,
            **dict(BLOCK=self._block_size, WINDOW=sizes.window or 0, TILE=sizes.tile),
            num_warps=8,
            num_stages=3,
        )
        if len(tiles.combined):
            _combine_splits[(kv_heads, sizes.num_queries, len(tiles.combined))](
                *(tiles.combined, tiles.sums, tiles.stats, out),
                **constants,
                num_warps=2,
            )


def tile_of(device: torch.device) -> int:
    """Returns the number of context tokens that a program computes at once on `device`."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] not in (9, 10):
        return SMALL_TILE
    return TILE


@triton.jit
def _add_tile(
    q,
    place,
    is_seen,
    is_there,
    keys,
    values,
    table,
    kv_head,
    scale,
    best,
    total,
    acc,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds the tokens at positions `place` `[TILE]` to the online softmax of the rows of `q`.

    Returns the new `best` (largest score), `total` (sum of exponentials) and `acc` (weighted sum
    of values). `is_seen` `[rows, TILE]` and `is_there` `[TILE]` are used only with `MASKED`.
    """
    d = tl.arange(0, D)
    if MASKED:
        block = tl.load(table + place // BLOCK, mask=is_there, other=0)
    else:
        block = tl.load(table + place // BLOCK)
    slot = block.to(tl.int64) * BLOCK + place % BLOCK
    where = (slot[:, None] * K + kv_head) * D + d[None, :]
    if MASKED:
        k = tl.load(keys + where, mask=is_there[:, None], other=0.0)
        v = tl.load(values + where, mask=is_there[:, None], other=0.0)
    else:
        k = tl.load(keys + where)
        v = tl.load(values + where)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if MASKED:
        scores = tl.where(is_seen, scores, float("-inf"))
    new_best = tl.maximum(best, tl.max(scores, 1))
    # A row that attends to no token of this or an earlier tile has no largest score yet.
    shift = tl.where(new_best == float("-inf"), 0.0, new_best) if MASKED else new_best
    weights = tl.exp2(scores - shift[:, None])
    alpha = tl.exp2(best - shift)
    total = total * alpha + tl.sum(weights, 1)
    acc = acc * alpha[:, None]
    acc += tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return new_best, total, acc


@triton.jit(do_not_specialize=["table_stride"])
def _attend_chunks(
    queries,
    keys,
    values,
    tables,
    items,
    out,
    sums,
    stats,
    scale,
    table_stride,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
):
    """Computes item `program_id(1)` for KV head `program_id(0)`.

    Row m of the tile is query m // GROUP and query head m % GROUP of the KV head.
    """
    kv_head, item = tl.program_id(0), items + tl.program_id(1) * 8
    table = tables + tl.load(item) * table_stride
    row, count, position = tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    begin, end, split = tl.load(item + 4), tl.load(item + 5), tl.load(item + 6)
    m, d, t = tl.arange(0, QUERIES * GROUP), tl.arange(0, D), tl.arange(0, TILE)
    query, head = m // GROUP, m % GROUP
    is_row = (query < count) & (head < G)
    lines = (row + query).to(tl.int64) * H + kv_head * G + head
    q = tl.load(queries + lines[:, None] * D + d[None, :], mask=is_row[:, None], other=0.0)
    best = tl.full([QUERIES * GROUP], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES * GROUP], tl.float32)
    acc = tl.zeros([QUERIES * GROUP, D], tl.float32)
    # Tiles to which every query attends completely need no mask. With a window, all tiles are
    # masked.
    middle = begin
    if WINDOW == 0:
        middle = begin + tl.maximum(tl.minimum(end, position + 1) - begin, 0) // TILE * TILE
        for start in range(begin, middle, TILE):
            best, total, acc = _add_tile(
                *(q, start + t, True, True, keys, values, table, kv_head, scale),
                *(best, total, acc, K, D, BLOCK, False),
            )
    for start in range(middle, end, TILE):
        place = start + t
        is_seen = (place[None, :] <= position + query[:, None]) & (place < end)[None, :]
        if WINDOW > 0:
            is_seen = is_seen & (place[None, :] > position + query[:, None] - WINDOW)
        best, total, acc = _add_tile(
            *(q, place, is_seen, place < end, keys, values, table, kv_head, scale),
            *(best, total, acc, K, D, BLOCK, True),
        )
    if split < 0:
        acc = acc / tl.where(is_row, total, 1.0)[:, None]
        where = out + lines[:, None] * D + d[None, :]
        tl.store(where, acc.to(out.dtype.element_ty), mask=is_row[:, None])
    else:
        at = (split.to(tl.int64) * K + kv_head) * (QUERIES * GROUP) + m
        tl.store(sums + at[:, None] * D + d[None, :], acc, mask=is_row[:, None])
        tl.store(stats + at * 2, best, mask=is_row)
        tl.store(stats + at * 2 + 1, total, mask=is_row)


@triton.jit
def _combine_splits(
    combined,
    sums,
    stats,
    out,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """Combines the splits of query `program_id(1)` of a tile, for one KV head."""
    kv_head, query = tl.program_id(0), tl.program_id(1)
    tile = combined + tl.program_id(2) * 4
    row, count = tl.load(tile), tl.load(tile + 1)
    first, num_splits = tl.load(tile + 2), tl.load(tile + 3)
    g, d = tl.arange(0, GROUP), tl.arange(0, D)
    is_row = (g < G) & (query < count)
    best = tl.full([GROUP], float("-inf"), tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    acc = tl.zeros([GROUP, D], tl.float32)
    for number in range(0, num_splits):
        at = (((first.to(tl.int64) + number) * K + kv_head) * QUERIES + query) * GROUP + g
        split_best = tl.load(stats + at * 2, mask=is_row, other=0.0)
        new_best = tl.maximum(best, split_best)
        # The first splits may lie before the window of a late query, and the last splits after an
        # early query.
        shift = tl.where(new_best == float("-inf"), 0.0, new_best)
        alpha, weight = tl.exp2(best - shift), tl.exp2(split_best - shift)
        total = total * alpha + tl.load(stats + at * 2 + 1, mask=is_row, other=1.0) * weight
        values = tl.load(sums + at[:, None] * D + d[None, :], mask=is_row[:, None], other=0.0)
        acc = acc * alpha[:, None] + values * weight[:, None]
        best = new_best
    lines = (row + query).to(tl.int64) * H + kv_head * G + g
    where = out + lines[:, None] * D + d[None, :]
    acc = acc / tl.where(is_row, total, 1.0)[:, None]
    tl.store(where, acc.to(out.dtype.element_ty), mask=is_row[:, None])
