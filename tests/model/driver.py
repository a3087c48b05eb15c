"""Runs our model as an engine does, and transformers' model as the oracle.

`Paged` owns a cache whose blocks it hands out in shuffled order, so that no sequence's blocks are
adjacent; `step` runs any mix of prefill chunks and decodes.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from serve_app.model.batch import Batch
from serve_app.model.checkpoint.checkpoint import inspect
from serve_app.model.checkpoint.loader import load
from serve_app.model.kv import KVCache
from serve_app.model.mixtral import Mixtral
from serve_app.model.quantization import Quantization

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "attn_implementation": "eager",
}


def random_oracle(seed: int = 0, **changes: Any) -> Any:
    """Returns transformers' `MixtralForCausalLM` with random float32 weights that are not tiny."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    config = MixtralConfig(**{**SMALL, "initializer_range": 0.2, **changes})
    oracle = MixtralForCausalLM(config).eval().requires_grad_(False)
    for name, weight in oracle.named_parameters():
        if "norm" in name:  # all ones would hide a norm that forgets its weight
            weight.uniform_(0.5, 1.5)
    return oracle


def load_folder(
    path: Path,
    dtype: torch.dtype,
    wanted: Quantization | None = None,
    quantize_lm_head: bool = False,
    progress: Callable[[float], None] | None = None,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> Mixtral:
    """Returns the model of the checkpoint in folder `path`, quantized as `wanted` where that can
    be."""
    checkpoint = inspect(path)
    return load(
        checkpoint,
        dtype=dtype,
        device=device,
        quantization=checkpoint.resolve_quantization(wanted, quantize_lm_head),
        quantize_lm_head=quantize_lm_head,
        progress=progress,
    )


def load_float32(path: Path, wanted: Quantization | None = None) -> Mixtral:
    return load_folder(path, torch.float32, wanted)


def random_ids(count: int, vocab_size: int = 96, seed: int = 1) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(vocab_size) for _ in range(count)]


def oracle_logits(oracle: Any, ids: list[int]) -> Tensor:
    """`[tokens, vocab_size]`"""
    logits: Tensor = oracle(torch.tensor([ids])).logits[0]
    return logits


class Paged:
    """Sequences by name, each with the tokens it has put into the cache."""

    def __init__(self, model: Mixtral, num_blocks: int = 128, block_size: int = 16) -> None:
        self.model = model
        cpu = torch.device("cpu")
        dtype = model.embedding.dtype
        self.cache = KVCache.allocate(model.config, num_blocks, block_size, dtype, cpu)
        self.free = list(range(num_blocks))
        random.Random(7).shuffle(self.free)
        self.blocks: dict[str, list[int]] = {}
        self.lengths: dict[str, int] = {}

    def step(self, rows: list[int] | None = None, **new_tokens: list[int]) -> dict[str, Tensor]:
        """Runs one batch: the logits `[tokens, vocab_size]` of every new token, by sequence.

        With `rows`, of those rows only, under the first sequence's name.
        """
        size = self.cache.block_size
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        for name, tokens in new_tokens.items():
            start = self.lengths.get(name, 0)
            end = start + len(tokens)
            table = self.blocks.setdefault(name, [])
            while len(table) * size < end:
                table.append(self.free.pop())
            ids += tokens
            positions += range(start, end)
            slots += [table[p // size] * size + p % size for p in range(start, end)]
            self.lengths[name] = end
        tables = [torch.tensor(self.blocks[name]) for name in new_tokens]
        batch = Batch(
            token_ids=torch.tensor(ids),
            positions=torch.tensor(positions),
            slots=torch.tensor(slots),
            query_lens=[len(tokens) for tokens in new_tokens.values()],
            context_lens=[self.lengths[name] for name in new_tokens],
            block_tables=torch.nn.utils.rnn.pad_sequence(tables, batch_first=True),
            sample_rows=torch.arange(len(ids)) if rows is None else torch.tensor(rows).long(),
        )
        logits: Tensor = self.model(batch, self.cache)
        if rows is not None:
            return {next(iter(new_tokens)): logits}
        return dict(zip(new_tokens, torch.split(logits, batch.query_lens), strict=True))
