"""Computes the logits of every token of one text, in prefill chunks."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from serve_app.engine.model_runner import ModelRunner
from serve_app.model.batch import Batch

CHUNK = 128
"""Tokens per prefill chunk. Their logits take 16 MB with Mixtral's vocabulary."""


def text_logits(runner: ModelRunner, token_ids: Sequence[int]) -> Iterator[Tensor]:
    """Yields the text's float32 logits `[at most CHUNK, vocab_size]`, one prefill chunk at a time.

    The text uses the first KV blocks, so no engine may run on `runner` at the same time.
    """
    cache = runner.cache
    device = cache.keys[0].device
    table = torch.arange(-(-len(token_ids) // cache.block_size), device=device)[None]
    for start in range(0, len(token_ids), CHUNK):
        ids = torch.tensor(token_ids[start : start + CHUNK], device=device)
        positions = torch.arange(start, start + len(ids), device=device)
        yield runner.prefill_logits(
            Batch(
                token_ids=ids,
                positions=positions,
                slots=positions,  # block p // block_size has the number p // block_size
                query_lens=[len(ids)],
                context_lens=[start + len(ids)],
                block_tables=table,
                sample_rows=torch.arange(len(ids), device=device),
            )
        )
