"""Decode steps of fixed sizes, their inputs in fixed places: captured once, replayed by one call.

A step of n sequences runs as the smallest size that holds them; rows that are left over have no
context, and are nobody's. A token that the step before has just given is taken on the device. The
best token of every row is found in the same replay; other ways of sampling follow it. Where the
device is no GPU the same calls run uncaptured, which is how tests see them.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from serve_app.engine.sampler import best_tokens, upload
from serve_app.engine.sequence import PENDING, Chunk, Sequence
from serve_app.model.kernels.rows import Rows

log = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
"""And on by 64. Each is one more graph to capture; leftover rows cost little."""


class Step(Protocol):
    """What is captured: logits from tensors alone, without asking the device anything."""

    def logits(self, rows: Rows) -> Tensor: ...


class DecodeGraphs:
    """The decode step of up to `most_rows` sequences with up to `most_blocks` blocks each."""

    def __init__(
        self, step: Step, most_rows: int, most_blocks: int, block_size: int, device: torch.device
    ) -> None:
        self._step, self._block_size, self._device = step, block_size, device
        self.sizes = sizes_up_to(most_rows)
        self.tokens = torch.zeros(self.sizes[-1], dtype=torch.int64, device=device)
        """Of the last step, by its rows: who launches a step in another way writes them here."""
        # Rows of: token id, the last step's row that has the token or -1, position, slot, context.
        self._inputs = torch.zeros(5, self.sizes[-1], dtype=torch.int64, device=device)
        self._tables = torch.zeros(self.sizes[-1], most_blocks, dtype=torch.int32, device=device)
        self._known: Tensor | None = None
        self._replays: dict[int, Callable[[], object]] = {}
        self._logits: dict[int, Tensor] = {}

    @classmethod
    def of(cls, *arguments: Any) -> "DecodeGraphs | str":
        """All sizes captured, or why that was not possible."""
        graphs = cls(*arguments)
        try:
            with graphs._stream():
                graphs.capture()
        except Exception as error:
            log.exception("a decode step was not captured")
            return f"capturing it failed ({type(error).__name__}: {str(error)[:200]})"
        return graphs

    def _stream(self) -> AbstractContextManager[object]:
        """Puts the stream back that a capture that failed may leave another one in place of."""
        if self._device.type != "cuda":
            return nullcontext()
        return torch.cuda.stream(torch.cuda.current_stream(self._device))

    @torch.inference_mode()
    def capture(self) -> None:
        """Captures every size, the largest first, all in one pool of memory."""
        pool = None
        for size in reversed(self.sizes):
            compute = self._computation(size)
            if self._device.type != "cuda":
                self._replays[size] = compute
                continue
            compute()  # kernels are compiled and loaded outside of a capture
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            # Of this thread alone: others may use the device meanwhile.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                compute()
            pool = graph.pool()
            self._replays[size] = graph.replay

    def run(
        self, chunks: list[Chunk], row_of: dict[Sequence, int], tables: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Float32 logits `[n, vocab]` of n decodes, and each row's best token, int64 `[n]`.

        Both until the next run. `row_of`: the last step's row of a sequence whose token is
        `PENDING`. `tables` `[n, blocks]` int64 on the host, another one when they have changed.
        """
        size = next(size for size in self.sizes if size >= len(chunks))
        self._inputs[:, :size].copy_(self._packed(chunks, row_of, size), non_blocking=True)
        self._put_tables(tables)
        self._replays[size]()
        return self._logits[size][: len(chunks)], self.tokens[: len(chunks)]

    def _packed(self, chunks: list[Chunk], row_of: dict[Sequence, int], size: int) -> Tensor:
        """What `_inputs` has, `[5, size]`."""
        columns: list[list[int]] = [[] for _ in range(5)]
        block = self._block_size
        for sequence, start, end, _ in chunks:
            token = sequence.token_ids[start]
            is_pending = token == PENDING
            columns[0].append(0 if is_pending else token)
            columns[1].append(row_of[sequence] if is_pending else -1)
            columns[2].append(start)
            columns[3].append(sequence.block_table[start // block] * block + start % block)
            columns[4].append(end)
        left = size - len(chunks)
        for column, filler in zip(columns, (0, -1, 0, 0, 0), strict=True):
            column += [filler] * left
        return upload([number for column in columns for number in column], self._device).view(5, -1)

    def _put_tables(self, tables: Tensor) -> None:
        if self._known is not None and torch.equal(self._known, tables):
            return
        self._known = tables.clone()
        rows, width = tables.shape
        host = tables.int()
        if self._device.type == "cuda":
            host = host.pin_memory()
        self._tables[:rows, :width].copy_(host, non_blocking=True)

    def _computation(self, size: int) -> Callable[[], None]:
        def compute() -> None:
            ids, sources, positions, slots, lens = self._inputs[:, :size].unbind()
            # A token that failed is none; its sequence ends when the host hears of it.
            fed = self.tokens[sources.clamp(min=0)].clamp(min=0)
            ids = torch.where(sources < 0, ids, fed)
            rows = Rows(ids, positions, slots, lens.int(), self._tables[:size])
            self._logits[size] = self._step.logits(rows)
            self.tokens[:size].copy_(best_tokens(self._logits[size]))

        return compute


def sizes_up_to(most_rows: int) -> list[int]:
    """The sizes that are captured for batches of up to `most_rows`."""
    sizes = [*SIZES, *range(SIZES[-1] + 64, most_rows + 64, 64)]
    enough = next(i for i, size in enumerate(sizes) if size >= most_rows)
    return sizes[: enough + 1]
