"""One step: chunks of sequences in, tensors through the model, each one's next token out.

Owns the KV cache's memory and the sampler; which block belongs to whom is the scheduler's business.
"""

from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from serve_app.engine.block_tables import BlockTables
from serve_app.engine.graphs import DecodeGraphs
from serve_app.engine.sampler import Sampled, Sampler, upload
from serve_app.engine.sequence import FAILED, PENDING, Chunk, Samples, Sequence
from serve_app.model.batch import Batch
from serve_app.model.kernels.cpu.cpu_step import CpuStep
from serve_app.model.kv import KVCache
from serve_app.model.mixtral import Mixtral

if TYPE_CHECKING:  # that module imports triton, which not every machine has
    from serve_app.model.kernels.triton.gpu_step import GpuStep


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
        *,
        most_rows: int = 128,
        looks_ahead: bool | None = None,
    ) -> None:
        """`most_rows`: sequences that may decode in one step. `looks_ahead`: whether a step may be
        started before the last one's tokens are known to the host; by default where the device
        works on its own, on a GPU."""
        self.looks_ahead = device.type == "cuda" if looks_ahead is None else looks_ahead
        self.model = model
        self.cache = KVCache.allocate(model.config, num_blocks, block_size, dtype, device)
        self._block_size = block_size
        self._device = device
        self._tables = BlockTables()
        self._sampler = Sampler()
        self._last = Launched(self.cache, [], None)
        step = _compiled_step(model, self.cache, most_rows, device)
        self._whole = step if isinstance(step, CpuStep) else None
        self._decode = None if isinstance(step, str | CpuStep) else step
        self._graphs: DecodeGraphs | None = None
        self.note = f"a {'step' if self._whole else 'decode step'} is one call of compiled code"
        self.note += self._captured(most_rows)
        """Which form of the model's step was chosen, and why."""
        if isinstance(step, str):
            self.note = f"a step is in plain torch; of the compiled one: {step}"

    def _captured(self, most_rows: int) -> str:
        """Captures the decode step where that is possible; what to say of it."""
        if self._decode is None:
            return ""
        longest = -(-self.model.config.max_position_embeddings // self._block_size) + 1
        most_blocks = min(self.cache.num_blocks, longest)
        graphs = DecodeGraphs.of(
            self._decode, most_rows, most_blocks, self._block_size, self._device
        )
        if isinstance(graphs, str):
            captured = f", launched kernel by kernel: {graphs}"
        else:
            self._graphs = graphs
            captured = f", a captured graph for each of {len(graphs.sizes)} sizes of batch"
        return captured + self._decode.unpack_for_prompts()

    @property
    def vocab_size(self) -> int:
        return self.model.config.vocab_size

    def step(self, chunks: list[Chunk]) -> Samples:
        return self.launch(chunks).samples()

    @torch.inference_mode()
    def launch(self, chunks: list[Chunk]) -> "Launched":
        """Starts a step; see `AheadRunner`."""
        sampled = [chunk.sequence for chunk in chunks if chunk.samples]
        best: Tensor | None = None
        if self._graphs is not None and all(chunk.is_decode for chunk in chunks):
            tables = self._tables.of(chunks)
            logits, best = self._graphs.run(chunks, self._last.row_of, tables)
        else:
            logits = self._logits(chunks)
        outcome = self._sampler.start(logits, sampled, best) if sampled else None
        if self._graphs is not None and outcome is not None and outcome.tokens is not best:
            self._graphs.tokens[: len(sampled)].copy_(outcome.tokens)
        self._last = Launched(self.cache, sampled, outcome)
        return self._last

    def _logits(self, chunks: list[Chunk]) -> Tensor:
        """`[sampled, vocab_size]`, in the order of the chunks."""
        if self._whole is not None:
            return self._whole.logits(self._batch(chunks))
        if self._decode is None:
            return self._plain(chunks)
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
            parts.append(self._plain([chunks[i] for i in others]))
            order += [i for i in others if chunks[i].samples]
        logits = torch.cat(parts) if len(parts) > 1 else parts[0]
        if order != sorted(order):
            logits = logits[sorted(range(len(order)), key=order.__getitem__)]
        return logits

    def _plain(self, chunks: list[Chunk]) -> Tensor:
        logits: Tensor = self.model(self._batch(chunks), self.cache)
        return logits

    def _feed(self, chunks: list[Chunk], token_ids: Tensor) -> None:
        """Puts the last step's tokens, which only the device knows, where they are pending."""
        rows, sources, end = [], [], 0
        for chunk in chunks:
            end += chunk.end - chunk.start
            if chunk.sequence.token_ids[chunk.end - 1] == PENDING:
                rows.append(end - 1)
                sources.append(self._last.row_of[chunk.sequence])
        where = upload([*rows, *sources], self._device).view(2, -1)
        # A token that failed is none; its sequence ends when the host hears of it.
        token_ids[where[0]] = self._last.tokens[where[1]].clamp(min=0)

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
        packed = upload(list(chain(*lists)), self._device)
        parts = packed.split_with_sizes([len(values) for values in lists])
        if PENDING in token_ids:
            self._feed(chunks, parts[0])
        return Batch(
            token_ids=parts[0],
            positions=parts[1],
            slots=parts[2],
            query_lens=[chunk.end - chunk.start for chunk in chunks],
            context_lens=[chunk.end for chunk in chunks],
            block_tables=self._tables.of(chunks).to(self._device),
            sample_rows=parts[3],
        )


def _compiled_step(
    model: Mixtral, cache: KVCache, most_rows: int, device: torch.device
) -> "CpuStep | GpuStep | str":
    """The form of the decode step that this device has, or why there is none."""
    if device.type != "cuda":
        return CpuStep.of(model, cache)
    try:
        from serve_app.model.kernels.triton.gpu_step import GpuStep
    except ImportError as error:
        return f"its kernels cannot be imported ({error})"
    return GpuStep.of(model, cache, most_rows)


class Launched:
    """A step under way: its tokens are on the device, or on their way to the host."""

    def __init__(self, cache: KVCache, sampled: list[Sequence], outcome: Sampled | None) -> None:
        self.row_of = {sequence: row for row, sequence in enumerate(sampled)}
        self._cache, self._sampled, self._outcome = cache, sampled, outcome
        self._tables = [sequence.block_table for sequence in sampled]
        # Read later, when the next step has written its own tokens where these are.
        self._host = torch.zeros(0)
        self._copied: Any = None
        if outcome is not None and not outcome.tokens.is_cuda:
            self._host = outcome.tokens.clone()
        elif outcome is not None:
            # Memory that the device writes to while the host does something else.
            self._host = torch.empty(len(sampled), dtype=torch.int64, pin_memory=True)
            self._host.copy_(outcome.tokens, non_blocking=True)
            event: Any = torch.cuda.Event  # which has no types
            self._copied = event()
            self._copied.record()

    @property
    def tokens(self) -> Tensor:
        """int64 `[sampled]` on the device."""
        assert self._outcome is not None
        return self._outcome.tokens

    @torch.inference_mode()
    def samples(self) -> Samples:
        """Waits for the step, not for those that were launched after it."""
        if self._outcome is None:
            return Samples([], {})
        if self._copied is not None:
            self._copied.synchronize()
        samples = self._outcome.samples(self._host.tolist())
        for row, token in enumerate(samples.token_ids):
            if token == FAILED:
                self._clear(self._sampled[row], self._tables[row])
        return samples

    def _clear(self, sequence: Sequence, table: list[int]) -> None:
        """Zeroes what a sequence left that is not finite: its blocks go to somebody else.

        Where they did so already, while the step ran, they are that one's, and stay.
        """
        if sequence.block_table is table:
            own = table[sequence.num_kept :]
            self._cache.clear(torch.tensor(own, device=self._cache.keys[0].device))
