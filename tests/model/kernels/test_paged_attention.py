"""The Triton decode attention, run by Triton's interpreter, beside plain torch's."""

import pytest
import torch
from torch import Tensor

from serve_app.model.attention import attend, plan_attention
from serve_app.model.batch import Batch
from serve_app.model.kernels.triton import paged_attention
from serve_app.model.kernels.triton.paged_attention import PagedAttention
from serve_app.model.kv import KVCache

LENGTHS = [1, 5, 64, 65, 131, 300]
NONE = torch.zeros(0, dtype=torch.int64)


def cache_of(lengths: list[int], shape: tuple[int, int, int], dtype: torch.dtype) -> KVCache:
    """Returns random keys and values for `lengths`; shape: KV heads, head_dim, block size."""
    kv_heads, head_dim, size = shape
    blocks = sum(-(-length // size) for length in lengths)
    generator = torch.Generator().manual_seed(0)
    pages = (torch.randn(blocks, size, kv_heads, head_dim, generator=generator) for _ in range(2))
    keys, values = (page.to(dtype) for page in pages)
    return KVCache(torch.stack([keys, values])[None])


def tables_of(lengths: list[int], cache: KVCache) -> Tensor:
    """Blocks in any order, none of them twice."""
    shuffled = torch.randperm(cache.num_blocks, generator=torch.Generator().manual_seed(1))
    width = -(-max(lengths) // cache.block_size)
    tables, taken = torch.zeros(len(lengths), width, dtype=torch.int64), 0
    for row, length in enumerate(lengths):
        count = -(-length // cache.block_size)
        tables[row, :count] = shuffled[taken : taken + count]
        taken += count
    return tables


def reference(queries: Tensor, lengths: list[int], cache: KVCache, window: int | None) -> Tensor:
    tables = tables_of(lengths, cache)
    batch = Batch(NONE, NONE, NONE, [1] * len(lengths), lengths, tables, NONE)
    out = queries.new_zeros(len(lengths), queries[0].numel())
    attend(plan_attention(batch, cache.block_size, window, queries.dtype), 0, queries, cache, out)
    return out


def by_kernel(
    queries: Tensor, lengths: list[int], tables: Tensor, cache: KVCache, window: int | None
) -> Tensor:
    kernel = PagedAttention(queries.shape[1], cache.keys[0], window, len(lengths))
    out = torch.full((len(lengths), queries[0].numel()), torch.nan, dtype=queries.dtype)
    lens = torch.tensor(lengths, dtype=torch.int32)
    kernel(queries, cache.keys[0], cache.values[0], tables.int(), lens, out)
    return out


@pytest.mark.parametrize(
    ("heads", "shape", "window"),
    [(8, (2, 32, 16), None), (2, (2, 16, 4), 21), (6, (2, 32, 8), None), (32, (8, 128, 16), None)],
    ids=["grouped", "window", "three to one", "Mixtral"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_it_attends_as_torch_does(
    heads: int,
    shape: tuple[int, int, int],
    window: int | None,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Contexts of one token, of whole tiles, of one more, of several splits, all in one batch."""
    monkeypatch.setattr(paged_attention, "NUM_PROGRAMS", 64)  # more than one split needs
    lengths = LENGTHS if heads < 32 else [1, 131]
    cache = cache_of(lengths, shape, dtype)
    generator = torch.Generator().manual_seed(2)
    queries = torch.randn(len(lengths), heads, shape[1], generator=generator).to(dtype)
    found = by_kernel(queries, lengths, tables_of(lengths, cache), cache, window)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-3
    expected = reference(queries, lengths, cache, window)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def test_a_row_has_the_same_bits_in_any_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, with others, and when one program takes all splits by turns; longer splits too."""
    monkeypatch.setattr(paged_attention, "MAX_SPLITS", 4)  # so that the longest has longer ones
    lengths = [1, 700, 131]
    cache = cache_of(lengths, (2, 16, 16), torch.float32)
    tables = tables_of(lengths, cache)
    queries = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(3))
    whole = by_kernel(queries, lengths, tables, cache, None)
    torch.testing.assert_close(whole, reference(queries, lengths, cache, None), rtol=0, atol=1e-5)
    for row in range(3):
        one = slice(row, row + 1)
        alone = by_kernel(queries[one], lengths[one], tables[one], cache, None)
        assert torch.equal(alone, whole[one])
    monkeypatch.setattr(paged_attention, "NUM_PROGRAMS", 1)
    assert torch.equal(by_kernel(queries, lengths, tables, cache, None), whole)


def test_rows_without_a_context_are_zeros() -> None:
    """A padding row in a batch of fixed size reads nothing, NaN or not."""
    cache = cache_of([16, 16], (2, 16, 16), torch.float32)
    cache.keys[0][0], cache.values[0][0] = torch.nan, torch.nan
    queries = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(4))
    found = by_kernel(queries, [0, 16], torch.tensor([[0], [1]]), cache, None)
    assert not found[0].any()
    assert found[1].isfinite().all()


def test_a_nan_in_the_context_reaches_the_row() -> None:
    """A NaN in a context makes its row NaN, so that the request fails; one beyond has no effect."""
    cache = cache_of([16, 16], (2, 16, 16), torch.float32)
    cache.values[0][0, 9], cache.keys[0][1, 9] = torch.nan, torch.nan
    queries = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(5))
    found = by_kernel(queries, [10, 10, 9], torch.tensor([[0], [1], [1]]), cache, None)
    assert found[0].isnan().all()
    assert found[1].isnan().all()
    assert found[2].isfinite().all()
