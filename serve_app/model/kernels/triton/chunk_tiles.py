"""ChunkTiles: how the attention of prefill chunks is divided among programs, listed by the host.

A tile is some adjacent queries of one chunk, with all query heads that share a KV head. Where a
step has too few tiles for a GPU, the context of each tile is cut into splits. Items with the
longest contexts come first, because programs start in the order of items. For example a chunk of 30
tokens after 4,000 cached ones is one tile with 8 splits of 512 tokens.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from serve_app.model.batch import Batch

MIN_SPLIT = 512
"""Minimum tokens of a split."""
NUM_PROGRAMS = 264
"""Programs for which contexts are cut into splits: two for each multiprocessor of an H200."""
ITEM_SIZE, COMBINED_SIZE = 8, 4
"""Numbers in the device's form of `Item` and `Combined`."""


@dataclass(frozen=True)
class TileSizes:
    """The sizes of a model's tiles."""

    num_queries: int
    """Queries of a tile."""
    group: int
    """Query heads that share a KV head, rounded up to a power of two."""
    num_kv_heads: int
    head_dim: int
    tile: int
    """Tokens of a context that a program computes at once."""
    window: int | None
    """Tokens that a query sees at most."""


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
    """The index of a split's partial result; -1 if the result is complete."""


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


def plan_tiles(batch: Batch, sizes: TileSizes) -> ChunkTiles:
    """Returns the tiles of a batch; a decode is a chunk of one token."""
    items, combined = items_of(batch.query_lens, batch.context_lens, sizes)
    numbers = [number for item in items for number in (*item, 0)]
    numbers += [number for each in combined for number in each]
    device = batch.block_tables.device
    packed = torch.tensor(numbers, dtype=torch.int32)
    if device.type == "cuda":
        packed = packed.pin_memory()
    packed = packed.to(device, non_blocking=True)
    lengths = (len(items) * ITEM_SIZE, len(combined) * COMBINED_SIZE)
    first, second = packed.split_with_sizes(lengths)
    splits = sum(each.num_splits for each in combined)
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
    """Returns the items of chunks with these numbers of new tokens and of all tokens."""
    whole: list[Item] = []
    first_row = 0
    for sequence, (num_new, length) in enumerate(zip(query_lens, context_lens, strict=True)):
        for done in range(0, num_new, sizes.num_queries):
            count, position = min(sizes.num_queries, num_new - done), length - num_new + done
            begin = 0 if sizes.window is None else max(0, position - sizes.window + 1)
            begin, end = begin // sizes.tile * sizes.tile, position + count
            whole.append(Item(sequence, first_row + done, count, position, begin, end, -1))
        first_row += num_new
    max_splits = NUM_PROGRAMS // (len(whole) * sizes.num_kv_heads)
    items: list[Item] = []
    combined: list[Combined] = []
    num_splits = 0
    for item in whole:
        parts = _split(item, max_splits, sizes.tile)
        if len(parts) > 1:
            parts = [p._replace(split=num_splits + i) for i, p in enumerate(parts)]
            combined.append(Combined(item.row, item.num_queries, num_splits, len(parts)))
            num_splits += len(parts)
        items += parts
    items.sort(key=lambda item: item.begin - item.end)
    return items, combined


def _split(item: Item, max_splits: int, tile: int) -> list[Item]:
    """`item` with its context cut into at most `max_splits` splits of whole `tile`s."""
    length = item.end - item.begin
    count = min(max_splits, length // MIN_SPLIT)
    if count < 2:
        return [item]
    size = -(-length // (count * tile)) * tile
    begins = range(item.begin, item.end, size)
    return [item._replace(begin=b, end=min(b + size, item.end)) for b in begins]
