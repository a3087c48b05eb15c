"""Causal grouped-query attention over the paged KV cache, in plain torch.

`plan_attention` prepares indices and masks once for a batch; `attend` uses them in every layer.
Sequences with one new token (decodes) are computed together, prefill chunks one by one. This is the
reference for all attention kernels, and runs where no kernel is available.

In float32 on a CPU a decode gets the same bits in any batch: contexts are padded to whole segments,
with weights that are exactly 0, and a matrix product of a fixed size sums the values of each
segment. Example: a context of 70 tokens is padded to 2 segments of 64, whether it is alone or in a
batch with a context of 100.

Letters: B sequences, L context tokens (padded), N new tokens, H query heads, K KV heads, G = H / K
query heads per KV head, D head_dim.
"""

from dataclasses import dataclass
from math import lcm

import torch
import torch.nn.functional as F
from torch import Tensor

from serve_app.model.batch import Batch
from serve_app.model.kv import KVCache

SEGMENT = 64
"""Number of context tokens in one product with values. MKL splits a longer sum depending on its
length; the sums of the segments are added in a fixed order, so padding does not change the
result."""
MIN_GROUP_TOKENS = 2048
"""Contexts that have fewer tokens together, after padding to the longest, are computed as one
group, which then costs less than several groups."""


@dataclass
class Decodes:
    """Sequences with one new token each, of similar context lengths."""

    rows: Tensor | slice
    """`[B]`: the rows of their new tokens in the flattened batch."""
    blocks: Tensor
    """`[B * L / block_size]`: the KV blocks of all sequences, one sequence after the other."""
    bias: Tensor
    """`[B, 1, L]`: 0 for the tokens that the query attends to, -inf for the others."""


@dataclass
class Chunk:
    """Several new tokens of one sequence."""

    rows: slice
    blocks: Tensor
    """`[ceil(L / block_size)]`: the KV blocks of the sequence."""
    context_len: int
    mask: Tensor | None
    """`[N, L]`, True for the tokens that a query attends to; None is causal with N = L."""


@dataclass
class AttentionPlan:
    """The indices and masks of one batch, for `attend` in every layer."""

    decodes: list[Decodes]
    chunks: list[Chunk]


def plan_attention(
    batch: Batch, block_size: int, window: int | None, dtype: torch.dtype
) -> AttentionPlan:
    """Returns the rows, KV blocks and masks of a batch.

    `window` is the size of the sliding window in tokens, or None.
    """
    starts = [0]
    for length in batch.query_lens:
        starts.append(starts[-1] + length)
    decoding = [i for i, length in enumerate(batch.query_lens) if length == 1]
    chunks = [
        _chunk(batch, i, starts[i], block_size, window)
        for i, length in enumerate(batch.query_lens)
        if length > 1
    ]
    groups = _similar(decoding, batch.context_lens)
    decodes = [_decodes(batch, group, starts, block_size, window, dtype) for group in groups]
    return AttentionPlan(decodes, chunks)


def attend(plan: AttentionPlan, layer: int, queries: Tensor, cache: KVCache, out: Tensor) -> None:
    """Writes the attention output to `out` `[rows, H * D]` from `queries` `[rows, H, D]`.

    The keys and values of the new tokens must be in the cache already.
    """
    for decodes in plan.decodes:
        _attend_decodes(decodes, layer, queries, cache, out)
    for chunk in plan.chunks:
        _attend_chunk(chunk, layer, queries, cache, out)


def _attend_decodes(
    decodes: Decodes, layer: int, queries: Tensor, cache: KVCache, out: Tensor
) -> None:
    size, _, length = decodes.bias.shape
    q = queries[decodes.rows].view(size, cache.num_kv_heads, -1, cache.head_dim)  # [B, K, G, D]
    keys, values = cache.read(layer, decodes.blocks)
    keys = keys.view(size, length, *keys.shape[1:])  # [B, L, K, D]
    values = values.view(-1, SEGMENT, *values.shape[1:])  # [B * S, SEGMENT, K, D]
    bias = decodes.bias.expand(size, q.shape[2], length)
    heads = []
    # One KV head at a time: a product over [B, K] would copy all keys to make them contiguous.
    for head in range(cache.num_kv_heads):
        scores = torch.baddbmm(
            bias, q[:, head], keys[:, :, head].transpose(1, 2), alpha=cache.head_dim**-0.5
        )
        weights = scores.softmax(-1).view(size, q.shape[2], -1, SEGMENT).transpose(1, 2)
        segments = torch.bmm(weights.reshape(-1, q.shape[2], SEGMENT), values[:, :, head])
        heads.append(segments.view(size, -1, *q.shape[2:]).sum(1))  # [B, G, D]
    out[decodes.rows] = torch.stack(heads, dim=1).view(size, -1)


def _attend_chunk(chunk: Chunk, layer: int, queries: Tensor, cache: KVCache, out: Tensor) -> None:
    keys, values = cache.read(layer, chunk.blocks)
    keys = keys[: chunk.context_len].transpose(0, 1)  # [K, L, D]
    values = values[: chunk.context_len].transpose(0, 1)
    q = queries[chunk.rows].transpose(0, 1)  # [H, N, D]
    num_heads, num_new, head_dim = q.shape
    shared = (cache.num_kv_heads, num_heads // cache.num_kv_heads, -1, -1)  # [K, G, L, D]
    attended = F.scaled_dot_product_attention(
        q.reshape(*shared[:2], num_new, head_dim),
        keys[:, None].expand(*shared),
        values[:, None].expand(*shared),
        attn_mask=chunk.mask,
        is_causal=chunk.mask is None,
    )
    out[chunk.rows] = attended.view(num_heads, num_new, head_dim).transpose(0, 1).flatten(1)


def _similar(decoding: list[int], context_lens: list[int]) -> list[list[int]]:
    """Groups sequences so that padding to the longest of a group at most doubles the work.

    Returns the indices of each group. Example: contexts [3000, 100, 2000] give [[0, 2], [1]].
    """
    groups: list[list[int]] = []
    longest = 0
    for i in sorted(decoding, key=lambda i: -context_lens[i]):
        if not groups or (
            2 * context_lens[i] < longest and longest * len(decoding) > MIN_GROUP_TOKENS
        ):
            groups.append([])
            longest = context_lens[i]
        groups[-1].append(i)
    return [sorted(group) for group in groups]


def _decodes(
    batch: Batch,
    group: list[int],
    starts: list[int],
    block_size: int,
    window: int | None,
    dtype: torch.dtype,
) -> Decodes:
    device = batch.block_tables.device
    lengths = [batch.context_lens[i] for i in group]
    longest = max(lengths)
    multiple = lcm(block_size, SEGMENT)
    num_blocks = -(-longest // multiple) * multiple // block_size
    tables = batch.block_tables[_rows(group, device), :num_blocks]
    tables = F.pad(tables, (0, num_blocks - tables.shape[1]))
    ends = torch.tensor(lengths, device=device)[:, None]
    positions = torch.arange(num_blocks * block_size, device=device)
    hidden = positions >= ends
    # Padding reads the sequence's own first block, because 0 times a NaN of another sequence would
    # be NaN.
    tables = torch.where(hidden[:, ::block_size], tables[:, :1], tables)
    if window is not None:
        hidden |= positions < ends - window
    bias = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
    rows = _rows([starts[i] for i in group], device)
    return Decodes(rows, tables.flatten(), bias[:, None])


def _chunk(batch: Batch, i: int, start: int, block_size: int, window: int | None) -> Chunk:
    num_new, context_len = batch.query_lens[i], batch.context_lens[i]
    blocks = batch.block_tables[i, : -(-context_len // block_size)]
    rows = slice(start, start + num_new)
    if num_new == context_len and (window is None or num_new <= window):
        return Chunk(rows, blocks, context_len, None)
    device = blocks.device
    queries = torch.arange(context_len - num_new, context_len, device=device)[:, None]
    positions = torch.arange(context_len, device=device)
    mask = positions <= queries
    if window is not None:
        mask &= positions > queries - window
    return Chunk(rows, blocks, context_len, mask)


def _rows(indices: list[int], device: torch.device) -> Tensor | slice:
    """Returns ascending `indices` as a slice if possible, because a slice copies nothing."""
    if indices[-1] - indices[0] + 1 == len(indices):
        return slice(indices[0], indices[-1] + 1)
    return torch.tensor(indices, device=device)
