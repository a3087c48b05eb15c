"""Compares a decode step with plain torch, on random keys and values."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from serve_app.model.batch import Batch
from serve_app.model.config import MixtralConfig
from serve_app.model.kernels.decode_batch import DecodeBatch
from serve_app.model.kv import KVCache

if TYPE_CHECKING:
    from serve_app.model.mixtral import Mixtral

TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 5e-2}
"""Maximum of the median relative error of rows of logits, compared with plain torch."""
TRIAL_ROWS, TRIAL_LAYERS = 20, 2
"""The trial compares logits after the first 2 layers and takes the median over 20 rows. Rounding
can flip the router's choice between two nearly equal experts, which makes single rows differ, and
through many layers nearly every row."""
LONG_CONTEXTS = (700, 1500, 2600, 4200, 4700)
"""Context lengths in tokens that attention divides into many splits, or into longer splits."""


def contexts(config: MixtralConfig, cache: KVCache) -> list[list[int]]:
    """Returns the context lengths of the rows of each batch of the trial.

    The first batch has contexts of 1 to `TRIAL_ROWS` KV blocks. The second batch has the lengths in
    `LONG_CONTEXTS` that fit into the model's context and `cache`, and a padding row; it is omitted
    if none fits. Example with blocks of 16 tokens: [1, 18, 35, ...] and [700, 1500, ..., 1].
    """
    size, longest = cache.block_size, config.max_position_embeddings
    count = max(1, min(cache.num_blocks, TRIAL_ROWS, longest // size))
    batches = [[i * size + i % size + 1 for i in range(count)]]
    long = [length for length in LONG_CONTEXTS if length <= longest][: cache.num_blocks - 1]
    return [*batches, [*long, 1]] if long else batches


@torch.inference_mode()
def error(
    model: "Mixtral",
    cache: KVCache,
    logits: Callable[[DecodeBatch], Tensor],
    lengths: Sequence[int],
) -> float:
    """Returns the median relative error of `logits` after the first layers, compared with plain
    torch. The result is NaN if a logit is not finite, after the first layers or after all.

    `lengths` has the context length of each row. If there are several rows, the last one is a
    padding row, which must not change the others. Row i writes its new token into block i of the
    unused `cache`. Its other context blocks are the blocks of all rows in turn, so that n rows need
    only n blocks even with long contexts.
    """
    count, size, device = len(lengths), cache.block_size, cache.keys[0].device
    blocks, lens = torch.arange(count, device=device), torch.tensor(lengths, device=device)
    for tensor in (*cache.keys, *cache.values):
        tensor[blocks] = torch.randn_like(tensor[blocks])
    last = (lens - 1) // size
    tables = torch.arange(int(last.max()) + 1, device=device).repeat(count, 1) % count
    tables[blocks, last] = blocks
    slots, tokens = blocks * size + (lens - 1) % size, blocks * 7 % model.config.vocab_size
    batch = Batch(
        token_ids=tokens,
        positions=lens - 1,
        slots=slots,
        query_lens=[1] * count,
        context_lens=list(lengths),
        block_tables=tables,
        sample_rows=blocks,
    )
    live = max(1, count - 1)
    context = torch.where(blocks < live, lens, 0)
    decode_batch = DecodeBatch(tokens, lens - 1, slots, context.int(), tables.int())
    is_finite = logits(decode_batch)[:live].isfinite().all()
    layers = model.layers
    try:
        model.layers = layers[:TRIAL_LAYERS]
        expected, actual = model(batch, cache), logits(decode_batch)
    finally:
        model.layers = layers
    cache.clear(blocks)
    errors = ((actual - expected).norm(dim=1) / expected.norm(dim=1))[:live]
    is_finite &= errors.isfinite().all()
    return float(errors.median()) if is_finite else float("nan")
