"""ChunkTiles: divides the attention of prefill chunks among programs, on the host.

A tile is a few adjacent queries of one chunk, with all query heads that share a KV head. A program
computes one item: a tile with its context, or with a part of it. If a step has too few tiles to
fill a GPU, the context of each tile is cut into parts (splits), and a second launch combines their
results. Items with the longest contexts come first, because programs start in the order of items.

Example, with 32 queries per tile, 8 KV heads and `NUM_PROGRAMS` 264: a chunk of 30 tokens after
4,000 cached tokens is one tile with a context of 4,030 tokens. 264 / 8 = 33 splits would fill the
GPU, but a split has at least 512 tokens, so there are 7 splits: six of 576 tokens, one of 574.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from serve_app.model.batch import Batch

MIN_SPLIT = 512
"""Minimum tokens of a split."""
NUM_PROGRAMS = 264
"""Contexts are cut into splits until a launch has about this many programs: two for each
multiprocessor of an H200."""
ITEM_SIZE, COMBINED_SIZE = 8, 4
"""Number of int32 of an `Item` and of a `Combined` on the device."""


@dataclass(frozen=True)
class TileSizes:
    """The sizes of a model's tiles."""

    num_queries: int
    """Number of queries of a tile."""
    group: int
    """Number of query heads that share a KV head, rounded up to a power of two."""
    num_kv_heads: int
    head_dim: int
    tile: int
    """Number of context tokens that a program computes at once."""
    window: int | None
    """Maximum number of tokens that a query attends to; None means all."""


class Item(NamedTuple):
    """The queries of a tile, and the part of their context that one program computes."""

    sequence: int
    row: int
    """Row of the first query in the batch."""
    num_queries: int
    position: int
    """Position of the first query in its sequence."""
    begin: int
    """First token of the part; a multiple of `TileSizes.tile`."""
    end: int
    """End of the part (exclusive)."""
    split: int
    """Index of the split in `ChunkTiles.sums`; -1 if the part is the whole context."""


class Combined(NamedTuple):
    """A tile whose splits are combined."""

    row: int
    num_queries: int
    first_split: int
    num_splits: int


@dataclass
class ChunkTiles:
    """The items of a step in the form that the kernels read. All layers use the same items."""

    items: Tensor
    """int32 `[items, 8]`: the fields of each `Item`, and a 0."""
    combined: Tensor
    """int32 `[tiles with splits, 4]`: the fields of `Combined`."""
    tables: Tensor
    """int32 `[sequences, max_blocks]`: each sequence's KV blocks in order."""
    sums: Tensor
    """float32 `[splits, K, rows, D]`: the weighted sums of values of each split."""
    stats: Tensor
    """float32 `[splits, K, rows, 2]`: the largest score and the sum of exponentials of each split.
    """


def plan_tiles(batch: Batch, sizes: TileSizes) -> ChunkTiles:
    """Returns the tiles of a batch; a decode is a chunk of one token."""
    items, combined = items_of(batch.query_lens, batch.context_lens, sizes)
    numbers = [number for item in items for number in (*item, 0)]
    numbers += [number for tile in combined for number in tile]
    device = batch.block_tables.device
    packed = torch.tensor(numbers, dtype=torch.int32)
    if device.type != "cpu":
        packed = packed.pin_memory()
    packed = packed.to(device, non_blocking=True)
    lengths = (len(items) * ITEM_SIZE, len(combined) * COMBINED_SIZE)
    first, second = packed.split_with_sizes(lengths)
    splits = sum(tile.num_splits for tile in combined)
    shape = (splits, sizes.num_kv_heads, sizes.num_queries * sizes.group)
    return ChunkTiles(
        items=first.view(-1, ITEM_SIZE),
        combined=second.view(-1, COMBINED_SIZE),
        tables=batch.block_tables.int(),
        sums=torch.empty(*shape, sizes.head_dim, dtype=torch.float32, device=device),
        stats=torch.empty(*shape, 2, dtype=torch.float32, device=device),
    )


def items_of(
    query_lens: list[int], context_lens: list[int], sizes: TileSizes
) -> tuple[list[Item], list[Combined]]:
    """Returns the items of a batch, and the tiles whose splits must be combined.

    `query_lens` and `context_lens` have the number of new tokens and of all tokens of each chunk.
    """
    unsplit: list[Item] = []
    first_row = 0
    for sequence, (num_new, length) in enumerate(zip(query_lens, context_lens, strict=True)):
        for done in range(0, num_new, sizes.num_queries):
            count, position = min(sizes.num_queries, num_new - done), length - num_new + done
            begin = 0 if sizes.window is None else max(0, position - sizes.window + 1)
            begin, end = begin // sizes.tile * sizes.tile, position + count
            unsplit.append(Item(sequence, first_row + done, count, position, begin, end, -1))
        first_row += num_new
    max_splits = NUM_PROGRAMS // (len(unsplit) * sizes.num_kv_heads)
    items: list[Item] = []
    combined: list[Combined] = []
    num_splits = 0
    for item in unsplit:
        parts = _split(item, max_splits, sizes.tile)
        if len(parts) > 1:
            parts = [p._replace(split=num_splits + i) for i, p in enumerate(parts)]
            combined.append(Combined(item.row, item.num_queries, num_splits, len(parts)))
            num_splits += len(parts)
        items += parts
    items.sort(key=lambda item: item.begin - item.end)
    return items, combined


def _split(item: Item, max_splits: int, tile: int) -> list[Item]:
    """Cuts the context of `item` into at most `max_splits` items, each of whole `tile`s."""
    length = item.end - item.begin
    count = min(max_splits, length // MIN_SPLIT)
    if count < 2:
        return [item]
    size = -(-length // (count * tile)) * tile
    begins = range(item.begin, item.end, size)
    return [item._replace(begin=b, end=min(b + size, item.end)) for b in begins]
