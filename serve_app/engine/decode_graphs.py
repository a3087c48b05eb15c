"""DecodeGraphs: decode steps of fixed batch sizes, captured as CUDA graphs.

A step of n sequences replays the graph of the smallest captured size that is at least n. The other
rows are padding, with context length 0. Example: 5 sequences replay the graph for 8 rows, with 3
rows of padding. The inputs of a graph are in fixed tensors. A token that the previous step has just
sampled is read on the device, so the host need not know it (async scheduling). The replay also
samples with `DeviceSampler`. Without one, it finds the best token of every row, which the sampler
in torch uses for greedy batches.

The same code can run without capture: kernel by kernel, in the same few batch sizes, whose kernels
are compiled before the first request. On a CPU it always does, for tests.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from serve_app.engine.device_sampler import DeviceSampler
from serve_app.engine.in_flight_tokens import InFlightTokens
from serve_app.engine.sampler import best_tokens
from serve_app.engine.scheduled_tokens import ScheduledTokens
from serve_app.engine.sequence import PENDING
from serve_app.engine.step_sizes import capture_sizes
from serve_app.engine.transfer import tensor_to_device, to_device
from serve_app.model.kernels.decode_batch import DecodeBatch
from serve_app.model.kernels.unavailable import StepUnavailable

log = logging.getLogger(__name__)


class DecodeStep(Protocol):
    """The computation that is captured. It must not copy anything to the host."""

    def logits(self, batch: DecodeBatch) -> Tensor:
        """Returns float32 logits `[rows, vocab]`, and writes the keys and values of `batch`."""
        ...


class DecodeGraphs:
    """The decode step of up to `max_num_seqs` sequences with up to `max_blocks` blocks each."""

    def __init__(
        self,
        step: DecodeStep,
        max_num_seqs: int,
        max_blocks: int,
        block_size: int,
        device: torch.device,
        sampler: DeviceSampler | None = None,
        *,
        is_eager: bool = False,
    ) -> None:
        """`sampler` must accept as many rows as the largest of `capture_sizes(max_num_seqs)`.

        With `is_eager`, `capture` computes each size once and captures none.
        """
        self._step, self._block_size, self._device = step, block_size, device
        self._sampler, self._is_eager = sampler, is_eager
        self.sizes = capture_sizes(max_num_seqs)
        # Six fields per row: token id; source (the row of the previous step that has sampled the
        # token, or -1); position; slot; context length; number of generated tokens.
        self._inputs = torch.zeros(6, self.sizes[-1], dtype=torch.int64, device=device)
        self._tables = torch.zeros(self.sizes[-1], max_blocks, dtype=torch.int32, device=device)
        self._tokens = torch.zeros(self.sizes[-1], dtype=torch.int64, device=device)
        # The host's copy of the last step's block tables; equal tables are not copied again.
        self._copied_tables: Tensor | None = None
        self._replays: dict[int, Callable[[], object]] = {}
        self._logits: dict[int, Tensor] = {}

    @classmethod
    def captured(cls, *arguments: Any, is_eager: bool = False) -> "DecodeGraphs":
        """Creates an object with the constructor's arguments and captures the graphs of all sizes.

        Raises `StepUnavailable` if a capture fails, and `torch.OutOfMemoryError` if the memory is
        too small.
        """
        graphs = cls(*arguments, is_eager=is_eager)
        try:
            with graphs._restored_stream():
                graphs.capture()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            log.exception("The decode step could not be captured as a CUDA graph.")
            reason = f"capturing it failed ({type(error).__name__}: {str(error)[:200]})"
            raise StepUnavailable(reason) from None
        return graphs

    def _restored_stream(self) -> AbstractContextManager[object]:
        """Returns a context that restores the current CUDA stream after a failed capture."""
        if self._device.type != "cuda":
            return nullcontext()
        return torch.cuda.stream(torch.cuda.current_stream(self._device))

    @torch.inference_mode()
    def capture(self) -> None:
        """Captures every size in one memory pool, the largest size first."""
        pool = None
        for size in reversed(self.sizes):
            compute = self._computation(size)
            self._replays[size] = compute
            if self._device.type == "cuda" or self._is_eager:
                compute()  # compiles and loads the kernels, which is not possible during a capture
            if self._device.type != "cuda" or self._is_eager:
                continue
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the device during the capture.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                compute()
            pool = graph.pool()
            self._replays[size] = graph.replay

    def run(
        self, decodes: list[ScheduledTokens], last: InFlightTokens | None, tables: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Computes n decodes. Returns float32 logits `[n, vocab]` and int64 tokens `[n]`.

        The tokens are those of the device sampler, or the best tokens without one. Both tensors are
        valid until the next call. `last` is the last launched step, which has sampled the `PENDING`
        tokens. `tables` are the block tables, int64 `[n, blocks]` on the host.
        """
        size = next(size for size in self.sizes if size >= len(decodes))
        if self._sampler is not None:
            self._sampler.prepare([part.sequence for part in decodes])
        inputs = self._pack(decodes, last, size)
        self._inputs[:, :size].copy_(inputs)
        self._copy_tables(tables)
        if last is not None and last.tokens.data_ptr() != self._tokens.data_ptr():
            self._tokens[: len(last.tokens)].copy_(last.tokens)
        self._replays[size]()
        return self._logits[size][: len(decodes)], self._tokens[: len(decodes)]

    def _pack(
        self, decodes: list[ScheduledTokens], last: InFlightTokens | None, size: int
    ) -> Tensor:
        """Returns the new values of `_inputs`, int64 `[6, size]`."""
        fields: list[list[int]] = [[] for _ in range(6)]
        block_size = self._block_size
        row_of = {} if last is None else last.row_of
        for sequence, start, end, _ in decodes:
            token = sequence.token_ids[start]
            is_pending = token == PENDING
            fields[0].append(0 if is_pending else token)
            fields[1].append(row_of[sequence] if is_pending else -1)
            fields[2].append(start)
            block = sequence.block_table[start // block_size]
            fields[3].append(block * block_size + start % block_size)
            fields[4].append(end)
            fields[5].append(sequence.num_output_tokens)
        padding = size - len(decodes)
        for field, value in zip(fields, (0, -1, 0, 0, 0, 0), strict=True):
            field += [value] * padding
        values = [value for field in fields for value in field]
        return to_device(values, self._device).view(6, -1)

    def _copy_tables(self, tables: Tensor) -> None:
        if self._copied_tables is not None and torch.equal(self._copied_tables, tables):
            return
        rows, width = tables.shape
        self._tables[:rows, :width].copy_(tensor_to_device(tables.int(), self._device))
        self._copied_tables = tables.clone()  # after the copy, so that a failed copy is repeated

    def _computation(self, size: int) -> Callable[[], None]:
        def compute() -> None:
            ids, sources, positions, slots, lens, num_output = self._inputs[:, :size].unbind()
            # FAILED (-1) is not a valid index. Its sequence ends when the host reads the token.
            pending = self._tokens[sources.clamp(min=0)].clamp(min=0)
            ids = torch.where(sources < 0, ids, pending)
            batch = DecodeBatch(ids, positions, slots, lens.int(), self._tables[:size])
            logits = self._step.logits(batch)
            self._logits[size] = logits
            if self._sampler is not None:
                self._sampler.launch(logits, num_output, self._tokens[:size])
            else:
                self._tokens[:size].copy_(best_tokens(logits))

        return compute
