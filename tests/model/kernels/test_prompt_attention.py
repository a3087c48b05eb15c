"""The Triton attention of prefill chunks, run by Triton's interpreter, beside plain torch's."""

import pytest
import torch
from torch import Tensor

from serve_app.model.attention import attend, plan_attention
from serve_app.model.batch import Batch
from serve_app.model.kernels.triton import chunk_tiles
from serve_app.model.kernels.triton.chunk_tiles import items_of
from serve_app.model.kernels.triton.prompt_attention import PromptAttention
from serve_app.model.kv import KVCache
from tests.model.kernels.test_paged_attention import cache_of, tables_of

NONE = torch.zeros(0, dtype=torch.int64)
CHUNKS = {
    "prompts, a decode, a chunk after a prefix hit": ([1, 7, 70, 3, 1], [1, 7, 70, 90, 66]),
    "many short prompts": ([2] * 9 + [5], [2] * 9 + [5]),
    "a last chunk": ([40], [201]),
}


def batch_of(query_lens: list[int], context_lens: list[int], cache: KVCache) -> Batch:
    tables = tables_of(context_lens, cache)
    return Batch(NONE, NONE, NONE, query_lens, context_lens, tables, NONE)


def both(
    heads: int, cache: KVCache, batch: Batch, window: int | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Returns the results of the kernel and of plain torch, `[tokens, heads * head_dim]`."""
    shape = (sum(batch.query_lens), heads, cache.head_dim)
    queries = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    expected = queries.new_zeros(queries.flatten(1).shape)
    attend(plan_attention(batch, cache.block_size, window, dtype), 0, queries, cache, expected)
    kernel = PromptAttention(heads, cache.keys[0], window)
    found = torch.full_like(expected, torch.nan)
    kernel(queries, cache.keys[0], cache.values[0], kernel.plan(batch), found)
    return found, expected


@pytest.mark.parametrize(("query_lens", "context_lens"), CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize(
    ("heads", "shape", "window"),
    [(8, (2, 32, 16), None), (2, (2, 16, 4), 21), (6, (2, 16, 8), None)],
    ids=["grouped", "window", "three to one"],
)
def test_it_attends_as_torch_does(
    query_lens: list[int],
    context_lens: list[int],
    heads: int,
    shape: tuple[int, int, int],
    window: int | None,
) -> None:
    """All chunks of a batch in one launch, with odd lengths and contexts cached before."""
    cache = cache_of(context_lens, shape, torch.float32)
    batch = batch_of(query_lens, context_lens, cache)
    found, expected = both(heads, cache, batch, window, torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_in_16_bits_at_mixtrals_sizes() -> None:
    """Two chunks of one layer of Mixtral 8x7B in float16."""
    cache = cache_of([130, 5], (8, 128, 16), torch.float16)
    batch = batch_of([33, 5], [130, 5], cache)
    found, expected = both(32, cache, batch, None, torch.float16)
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-3)


@pytest.mark.parametrize("window", [None, 100, 300])
def test_long_contexts_are_split(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few queries after many cached tokens: several programs for a tile, with the same result."""
    monkeypatch.setattr(chunk_tiles, "MIN_SPLIT", 64)
    lengths = [400, 70]
    cache = cache_of(lengths, (2, 16, 16), torch.float32)
    batch = batch_of([40, 3], lengths, cache)
    found, expected = both(4, cache, batch, window, torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    items, combined = items_of([40, 3], lengths, PromptAttention(4, cache.keys[0], window).sizes)
    assert len(items) > 2
    assert combined


def test_every_token_is_in_one_tile() -> None:
    """Tiles cover each query once, with its context and no token beyond; the longest come first."""
    kernel = PromptAttention(32, torch.empty(1, 16, 8, 128), None)
    items, combined = items_of([100, 1, 8000], [100, 33, 9000], kernel.sizes)
    assert not combined
    rows = sorted(row for item in items for row in range(item.row, item.row + item.num_queries))
    assert rows == list(range(8101))
    assert all(item.begin == 0 for item in items)
    assert all(item.end == item.position + item.num_queries for item in items)
    assert [item.end for item in items] == sorted((item.end for item in items), reverse=True)
    assert items[0].end == 9000


def test_a_nan_beyond_a_context_has_no_effect() -> None:
    """A NaN in the rest of a KV block is not read; one in the context reaches its queries."""
    cache = cache_of([16, 16], (2, 16, 16), torch.float32)
    cache.values[0][0, 9], cache.keys[0][1, 9] = torch.nan, torch.nan
    tables = torch.tensor([[0], [1]])
    for length in (9, 10):
        batch = Batch(NONE, NONE, NONE, [4, 4], [length, length], tables, NONE)
        found, _ = both(4, cache, batch, None, torch.float32)
        assert found.isfinite().all() == (length == 9)
        assert found[[3, 7]].isnan().all() == (length == 10)
