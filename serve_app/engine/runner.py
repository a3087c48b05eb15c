"""One step: chunks of sequences in, tensors through the model, each one's next token out.

Owns the KV cache's memory and the sampler; which block belongs to whom is the scheduler's business.
"""

from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

from serve_app.engine.sampler import Sampler
from serve_app.engine.sequence import FAILED, Chunk, Samples
from serve_app.model.batch import Batch
from serve_app.model.kernels.cpu_step import CpuStep
from serve_app.model.kv import KVCache
from serve_app.model.mixtral import Mixtral


class Runner(Protocol):
    """What the engine asks of whoever computes its steps."""

    @property
    def vocab_size(self) -> int: ...

    def step(self, chunks: list[Chunk]) -> Samples:
        """Computes `chunks` (never none) and samples for those with `samples`, in their order."""
        ...


class ModelRunner:
    """Computes steps with a Mixtral and a KV cache of its own on `device`."""

    def __init__(
        self,
        model: Mixtral,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.model = model
        self.cache = KVCache.allocate(model.config, num_blocks, block_size, dtype, device)
        self._block_size = block_size
        self._device = device
        self._tables = _BlockTables()
        self._sampler = Sampler()
        step = CpuStep.of(model, self.cache)
        self._decode = None if isinstance(step, str) else step
        self.note = "a decode step is one call of compiled code"
        """Which form of the model's step was chosen, and why."""
        if isinstance(step, str):
            self.note = f"a decode step is in plain torch; of the compiled one: {step}"

    @property
    def vocab_size(self) -> int:
        return self.model.config.vocab_size

    @torch.inference_mode()
    def step(self, chunks: list[Chunk]) -> Samples:
        logits = self._logits(chunks)
        sampled = [chunk.sequence for chunk in chunks if chunk.samples]
        if not sampled:
            return Samples([], {})
        samples = self._sampler.sample(logits, sampled)
        for sequence, token in zip(sampled, samples.token_ids, strict=True):
            if token == FAILED:
                # It left numbers that are not finite, and its blocks go to somebody else.
                own = sequence.block_table[sequence.num_kept :]
                self.cache.clear(torch.tensor(own, device=self._device))
        return samples

    def _logits(self, chunks: list[Chunk]) -> Tensor:
        """`[sampled, vocab_size]`, in the order of the chunks."""
        if self._decode is None:
            plain: Tensor = self.model(self._batch(chunks), self.cache)
            return plain
        decodes = [i for i, chunk in enumerate(chunks) if chunk.end - chunk.start == 1]
        others = [i for i, chunk in enumerate(chunks) if chunk.end - chunk.start > 1]
        parts, order = [], []
        if decodes:
            sampling = [i for i in decodes if chunks[i].samples]
            logits = self._decode.decode(self._batch([chunks[i] for i in decodes]))
            if sampling != decodes:
                logits = logits[[decodes.index(i) for i in sampling]]
            parts.append(logits)
            order += sampling
        if others:
            parts.append(self.model(self._batch([chunks[i] for i in others]), self.cache))
            order += [i for i in others if chunks[i].samples]
        logits = torch.cat(parts) if len(parts) > 1 else parts[0]
        if order != sorted(order):
            logits = logits[sorted(range(len(order)), key=order.__getitem__)]
        return logits

    def _batch(self, chunks: list[Chunk]) -> Batch:
        size = self._block_size
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        sample_rows: list[int] = []
        for sequence, start, end, samples in chunks:
            table = sequence.block_table
            token_ids += sequence.token_ids[start:end]
            positions += range(start, end)
            slots += [table[p // size] * size + p % size for p in range(start, end)]
            if samples:
                sample_rows.append(len(token_ids) - 1)
        # One tensor, hence one copy to the device.
        lists = (token_ids, positions, slots, sample_rows)
        packed = torch.tensor(list(chain(*lists)), dtype=torch.int64).to(self._device)
        parts = packed.split_with_sizes([len(values) for values in lists])
        return Batch(
            token_ids=parts[0],
            positions=parts[1],
            slots=parts[2],
            query_lens=[chunk.end - chunk.start for chunk in chunks],
            context_lens=[chunk.end for chunk in chunks],
            block_tables=self._tables.of(chunks).to(self._device),
            sample_rows=parts[3],
        )


class _BlockTables:
    """The block tables of a batch as one padded tensor.

    Most steps change nothing or add a block here and there, so the last tensor is kept.
    """

    def __init__(self) -> None:
        self._tables: list[list[int]] = []
        self._lengths: list[int] = []
        self._tensor = torch.zeros(0, 0, dtype=torch.int64)

    def of(self, chunks: list[Chunk]) -> Tensor:
        """`[sequences, max_blocks]` on the host, rows padded with 0."""
        tables = [chunk.sequence.block_table for chunk in chunks]
        lengths = [len(table) for table in tables]
        is_same = len(tables) == len(self._tables) and all(
            table is known for table, known in zip(tables, self._tables, strict=True)
        )
        if not is_same or max(lengths) > self._tensor.shape[1]:
            # A quarter more columns than needed, so that growing is rare.
            width = max(lengths) + max(lengths) // 4 + 1
            self._tensor = torch.zeros(len(tables), width, dtype=torch.int64)
            known_lengths = [0] * len(tables)
        else:
            known_lengths = self._lengths
        for row, (table, known) in enumerate(zip(tables, known_lengths, strict=True)):
            if len(table) > known:
                self._tensor[row, known : len(table)] = torch.tensor(table[known:])
        self._tables, self._lengths = tables, lengths
        return self._tensor[:, : max(lengths)]
