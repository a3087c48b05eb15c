"""Compares a kernel for the attention of decodes with plain float32, on random data."""

from collections.abc import Callable

import torch
from torch import Tensor

from serve_app.model.attention import attend, plan_attention
from serve_app.model.batch import Batch
from serve_app.model.config import MixtralConfig
from serve_app.model.kernels.decode_batch import DecodeBatch
from serve_app.model.kv import KVCache

BLOCK_SIZE = 16
CONTEXTS = (1, 70, 300, 1500, 4500, 9000)
"""Context lengths in tokens. Together they test every number and size of splits in the kernels
(`cuda/splits.cuh`, `triton/paged_attention.py`)."""

Attention = Callable[[Tensor, Tensor, Tensor, DecodeBatch, Tensor], object]
"""A function `attention(queries, keys, values, batch, out)` that fills `out` `[B, H * D]`.

`queries` is `[B, H, D]`; `keys` and `values` are `[blocks, block_size, KV heads, D]`."""


@torch.inference_mode()
def attention_error(
    attention: Attention, config: MixtralConfig, dtype: torch.dtype, device: torch.device
) -> float:
    """Returns the largest relative error of a row of `CONTEXTS`; infinity for a NaN.

    Rows are compared one by one. The output of a row with a long context is small, because it is
    the mean of many random values, so it would hardly change an error over all rows.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    count, width = len(CONTEXTS), -(-max(CONTEXTS) // BLOCK_SIZE)
    heads, head_dim = config.num_attention_heads, config.head_dim
    shape = (width, BLOCK_SIZE, config.num_key_value_heads, head_dim)
    keys, values, queries = random(*shape), random(*shape), random(count, heads, head_dim)
    # All rows share the same blocks, each in another order, to save memory.
    blocks, rows = torch.arange(width, device=device), torch.arange(count, device=device)
    tables = (5 * rows[:, None] - blocks) % width
    lens = torch.tensor(CONTEXTS, dtype=torch.int32, device=device)
    none = lens.new_empty(0)
    actual = torch.full_like(queries, torch.nan).flatten(1)
    attention(queries, keys, values, DecodeBatch(none, none, none, lens, tables.int()), actual)

    batch = Batch(none, none, none, [1] * count, list(CONTEXTS), tables, none)
    plan = plan_attention(batch, BLOCK_SIZE, config.sliding_window, torch.float32)
    expected = torch.empty_like(actual, dtype=torch.float32)
    attend(plan, 0, queries.float(), KVCache(torch.stack([keys, values]).float()[None]), expected)
    errors = (actual.float() - expected).norm(dim=1) / expected.norm(dim=1)
    return float(errors.nan_to_num(torch.inf, torch.inf).max())
