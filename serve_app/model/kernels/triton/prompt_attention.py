# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Attention of prefill chunks over the paged KV cache on a GPU, in Triton: one launch for a step.

Computes what `attention.py` computes, to the rounding of the cache's dtype. A program takes one KV
head and a tile: some adjacent queries of one chunk, with all query heads that share the KV head. It
reads keys and values in place, through the block table. The host lists the tiles once for a step,
those with the longest contexts first, and never waits for the device. Where tiles are too few for a
GPU, the context of each is cut into splits, and a second launch combines them in their order. For
example a chunk of 30 tokens after 4,000 cached ones is one tile with 8 splits of 512 tokens.

Compiled for compute capabilities 8.0, 9.0 and 12.0, and not yet run on a device.

Letters: T tokens of the batch, H query heads, K KV heads, G = H / K, D head_dim.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from serve_app.model.batch import Batch

ROWS = 128
"""Pairs of a query and a head in a tile; half as many where head_dim is larger than 128."""
TILE, SMALL_TILE = 64, 32
"""Tokens of a context that a program computes at once, and those on GPUs without the matrix
instructions of compute capabilities 9 and 10, where 64 take more registers than there are."""
MIN_SPLIT = 512
"""Minimum tokens of a split."""
NUM_PROGRAMS = 264
"""Programs for which contexts are cut into splits: two for each multiprocessor of an H200."""
LOG2_E = 1.4426950408889634
ITEM_SIZE, COMBINED_SIZE = 8, 4
"""Numbers in the device's form of `Item` and `Combined`."""


class Item(NamedTuple):
    """Queries of one chunk and the part of their context that a program reads."""

    sequence: int
    row: int
    """Row of the first query in the batch."""
    num_queries: int
    position: int
    """Position of the first query in its sequence."""
    begin: int
    """First token of the context."""
    end: int
    split: int
    """Where the result waits for `_combine`; -1 where it is complete."""


class Combined(NamedTuple):
    """Splits of one tile."""

    row: int
    num_queries: int
    first_split: int
    num_splits: int


@dataclass
class ChunkTiles:
    """The tiles of a step as the kernels read them, the same in every layer."""

    items: Tensor
    """int32 `[items, 8]`: the fields of `Item`, and a 0."""
    combined: Tensor
    """int32 `[tiles with splits, 4]`: the fields of `Combined`."""
    tables: Tensor
    """int32 `[sequences, max_blocks]`: each sequence's KV blocks in order."""
    sums: Tensor
    """float32 `[splits, K, rows, D]`: the weighted sums of values of each split."""
    stats: Tensor
    """float32 `[splits, K, rows, 2]`: the largest score and the sum of exponentials."""


class PromptAttention:
    """Attention of the chunks of a step."""

    def __init__(self, num_heads: int, layer_keys: Tensor, window: int | None) -> None:
        """`layer_keys` is one layer's keys `[num_blocks, block_size, K, D]`."""
        self.num_heads, self.window = num_heads, window
        _, self.block_size, self.num_kv_heads, self.head_dim = layer_keys.shape
        self.group = triton.next_power_of_2(num_heads // self.num_kv_heads)
        rows = ROWS if self.head_dim <= 128 else ROWS // 2
        self.num_queries = max(1, rows // self.group)
        """Queries of a tile."""
        self.tile = tile_of(layer_keys.device)

    def plan(self, batch: Batch) -> ChunkTiles:
        """The tiles of a batch; a decode is a chunk of one token."""
        items, combined = self._items(batch.query_lens, batch.context_lens)
        numbers = [number for item in items for number in (*item, 0)]
        numbers += [number for each in combined for number in each]
        device = batch.block_tables.device
        packed = torch.tensor(numbers, dtype=torch.int32)
        if device.type == "cuda":
            packed = packed.pin_memory()
        packed = packed.to(device, non_blocking=True)
        sizes = (len(items) * ITEM_SIZE, len(combined) * COMBINED_SIZE)
        first, second = packed.split_with_sizes(sizes)
        splits = sum(each.num_splits for each in combined)
        shape = (splits, self.num_kv_heads, self.num_queries * self.group)
        return ChunkTiles(
            items=first.view(-1, ITEM_SIZE),
            combined=second.view(-1, COMBINED_SIZE),
            tables=batch.block_tables.int(),
            sums=torch.empty(*shape, self.head_dim, dtype=torch.float32, device=device),
            stats=torch.empty(*shape, 2, dtype=torch.float32, device=device),
        )

    def __call__(
        self, queries: Tensor, keys: Tensor, values: Tensor, tiles: ChunkTiles, out: Tensor
    ) -> None:
        """Fills `out` `[T, H * D]` from `queries` `[T, H, D]`, both of the cache's dtype.

        `keys` and `values` `[num_blocks, block_size, K, D]` hold those of the new tokens.
        """
        sizes = {"H": self.num_heads, "K": self.num_kv_heads, "D": self.head_dim}
        sizes |= {"G": self.num_heads // self.num_kv_heads, "GROUP": self.group}
        sizes |= {"QUERIES": self.num_queries}
        _attend_chunks[(self.num_kv_heads, len(tiles.items))](
            *(queries, keys, values, tiles.tables, tiles.items, out, tiles.sums, tiles.stats),
            *(self.head_dim**-0.5 * LOG2_E, tiles.tables.stride(0)),
            **sizes,
            **dict(BLOCK=self.block_size, WINDOW=self.window or 0, TILE=self.tile),
            num_warps=8,
            num_stages=3,
        )
        if len(tiles.combined):
            _combine_splits[(self.num_kv_heads, self.num_queries, len(tiles.combined))](
                *(tiles.combined, tiles.sums, tiles.stats, out),
                **sizes,
                num_warps=2,
            )

    def _items(
        self, query_lens: list[int], context_lens: list[int]
    ) -> tuple[list[Item], list[Combined]]:
        """The tiles of chunks with these numbers of new tokens and of all tokens."""
        whole: list[Item] = []
        first_row = 0
        for sequence, (num_new, length) in enumerate(zip(query_lens, context_lens, strict=True)):
            for done in range(0, num_new, self.num_queries):
                count, position = min(self.num_queries, num_new - done), length - num_new + done
                begin = 0 if self.window is None else max(0, position - self.window + 1)
                begin, end = begin // self.tile * self.tile, position + count
                whole.append(Item(sequence, first_row + done, count, position, begin, end, -1))
            first_row += num_new
        max_splits = NUM_PROGRAMS // (len(whole) * self.num_kv_heads)
        items: list[Item] = []
        combined: list[Combined] = []
        num_splits = 0
        for item in whole:
            parts = _split(item, max_splits, self.tile)
            if len(parts) > 1:
                parts = [p._replace(split=num_splits + i) for i, p in enumerate(parts)]
                combined.append(Combined(item.row, item.num_queries, num_splits, len(parts)))
                num_splits += len(parts)
            items += parts
        items.sort(key=lambda item: item.begin - item.end)
        return items, combined


def tile_of(device: torch.device) -> int:
    """The tokens of a context that a program computes at once on `device`."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] not in (9, 10):
        return SMALL_TILE
    return TILE


def _split(item: Item, max_splits: int, tile: int) -> list[Item]:
    """`item` with its context cut into at most `max_splits` splits of whole `tile`s."""
    length = item.end - item.begin
    count = min(max_splits, length // MIN_SPLIT)
    if count < 2:
        return [item]
    size = -(-length // (count * tile)) * tile
    begins = range(item.begin, item.end, size)
    return [item._replace(begin=b, end=min(b + size, item.end)) for b in begins]


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
    mixed,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds the tokens at `place` `[TILE]` to the running softmax of the rows of `q`.

    `is_seen` `[rows, TILE]` and `is_there` `[TILE]` are read where `MASKED` alone.
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
    # A row that sees no token of this tile and of those before has no largest score yet.
    shift = tl.where(new_best == float("-inf"), 0.0, new_best) if MASKED else new_best
    weights = tl.exp2(scores - shift[:, None])
    fade = tl.exp2(best - shift)
    total = total * fade + tl.sum(weights, 1)
    mixed = mixed * fade[:, None]
    mixed += tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return new_best, total, mixed


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
    """Item `program_id(1)` for KV head `program_id(0)`. Rows are `[QUERIES, GROUP]`, flat."""
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
    mixed = tl.zeros([QUERIES * GROUP, D], tl.float32)
    # Whole tiles that every query sees need no mask. With a window all tiles have one.
    middle = begin
    if WINDOW == 0:
        middle = begin + tl.maximum(tl.minimum(end, position + 1) - begin, 0) // TILE * TILE
        for start in range(begin, middle, TILE):
            best, total, mixed = _add_tile(
                *(q, start + t, True, True, keys, values, table, kv_head, scale),
                *(best, total, mixed, K, D, BLOCK, False),
            )
    for start in range(middle, end, TILE):
        place = start + t
        is_seen = (place[None, :] <= position + query[:, None]) & (place < end)[None, :]
        if WINDOW > 0:
            is_seen = is_seen & (place[None, :] > position + query[:, None] - WINDOW)
        best, total, mixed = _add_tile(
            *(q, place, is_seen, place < end, keys, values, table, kv_head, scale),
            *(best, total, mixed, K, D, BLOCK, True),
        )
    if split < 0:
        mixed = mixed / tl.where(is_row, total, 1.0)[:, None]
        where = out + lines[:, None] * D + d[None, :]
        tl.store(where, mixed.to(out.dtype.element_ty), mask=is_row[:, None])
    else:
        at = (split.to(tl.int64) * K + kv_head) * (QUERIES * GROUP) + m
        tl.store(sums + at[:, None] * D + d[None, :], mixed, mask=is_row[:, None])
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
    mixed = tl.zeros([GROUP, D], tl.float32)
    for number in range(0, num_splits):
        at = (((first.to(tl.int64) + number) * K + kv_head) * QUERIES + query) * GROUP + g
        most = tl.load(stats + at * 2, mask=is_row, other=0.0)
        new_best = tl.maximum(best, most)
        # The first splits of a late query may lie before its window, the last beyond an early one.
        shift = tl.where(new_best == float("-inf"), 0.0, new_best)
        fade, weight = tl.exp2(best - shift), tl.exp2(most - shift)
        total = total * fade + tl.load(stats + at * 2 + 1, mask=is_row, other=1.0) * weight
        values = tl.load(sums + at[:, None] * D + d[None, :], mask=is_row[:, None], other=0.0)
        mixed = mixed * fade[:, None] + values * weight[:, None]
        best = new_best
    lines = (row + query).to(tl.int64) * H + kv_head * G + g
    where = out + lines[:, None] * D + d[None, :]
    mixed = mixed / tl.where(is_row, total, 1.0)[:, None]
    tl.store(where, mixed.to(out.dtype.element_ty), mask=is_row[:, None])
