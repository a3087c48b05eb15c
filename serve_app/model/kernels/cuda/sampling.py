"""Sampling on a GPU in one launch: tokens from logits, each row by its own parameters."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serve_app.model.kernels.cuda.launcher import Grid
from serve_app.model.kernels.cuda.products import Launchable, MakeKernel
from serve_app.model.kernels.unavailable import StepUnavailable

THREADS, CANDIDATES = 1024, 256
"""Threads of a block; logits that are compared with each other to find a threshold."""
MAX_VALUES = 32
"""Logits that a thread may hold in registers."""
MAX_VOCAB = THREADS * MAX_VALUES
MAX_PARTS, FOUND_BYTES = 16, 16
"""Blocks that share a row, and what each of them finds."""
IN_PROMPT = -(1 << 31)
"""The bit of a token's count that says that the prompt has the token."""

ROW = np.dtype(
    [
        ("seed", np.uint64),
        ("counts", np.uint64),
        ("lists", np.uint64),
        ("temperature", np.float32),
        ("top_p", np.float32),
        ("log_min_p", np.float32),
        ("presence", np.float32),
        ("frequency", np.float32),
        ("repetition", np.float32),
        ("top_k", np.int32),
        ("min_tokens", np.int32),
        ("num_biases", np.int32),
        ("num_stops", np.int32),
        ("mask", np.int32),
        ("is_filtered", np.int32),
    ]
)
"""The parameters of a row, as in sample.cu. `counts` and `lists` are addresses of int32 tensors on
the device. `counts` `[vocab]` has how often each token was generated, with `IN_PROMPT`; the kernel
adds the token that it samples. `lists` has the biased ids, their biases as float32, then the stop
ids."""


class SampleKernel:
    """The compiled kernel for `vocab_size` and at most `max_rows` rows, with its memory."""

    def __init__(
        self,
        vocab_size: int,
        max_rows: int,
        blocks: int,
        device: torch.device,
        make: MakeKernel,
        threads: int = THREADS,
        candidates: int = CANDIDATES,
    ) -> None:
        """`blocks` run at once: one for each multiprocessor. Raises `StepUnavailable`."""
        self._blocks, self.max_rows = blocks, max_rows
        values = -(-vocab_size // threads)
        if values > MAX_VALUES:
            raise StepUnavailable(f"the vocabulary has more than {threads * MAX_VALUES} tokens")
        macros = [f"THREADS={threads}", f"VALUES={values}", f"CANDIDATES={candidates}"]
        shared = 12 * candidates + threads // 32 * FOUND_BYTES + 8
        self._kernel: Launchable = make("sample", macros, Grid(blocks, threads, shared, True))
        self._scores = torch.empty(max_rows, vocab_size, device=device)
        found = (max_rows, MAX_PARTS, FOUND_BYTES)
        self._partial = torch.empty(found, dtype=torch.uint8, device=device)
        self._arrivals = torch.zeros(max_rows, dtype=torch.int32, device=device)

    def launch(
        self,
        logits: Tensor,
        rows: Tensor,
        positions: Tensor,
        masks: Tensor | None,
        tokens: Tensor,
    ) -> None:
        """Fills `tokens` int64 `[rows]` from float32 `logits` `[rows, vocab]`, which stay as they
        are.

        `rows` has `ROW`s as bytes; `positions` int64 `[rows]` are the numbers of generated tokens.
        `masks` int32 `[grammars, ceil(vocab / 32)]` has a bit for each token that a grammar allows.
        With masks, rows whose `mask` is -1 are left out; without, the others are. A row without
        finite logits gets -1. Order and meaning of the operations are `SamplingParams`'.
        """
        count, vocab_size = logits.shape
        parts = min(MAX_PARTS, max(1, self._blocks // count))
        memory = (self._scores, self._partial, self._arrivals)
        inputs = (logits, rows, positions, masks, tokens)
        self._kernel.launch(*inputs, *memory, parts, vocab_size, blocks=count * parts)


def empty_rows(count: int) -> NDArray[Any]:
    """`ROW`s that take the best token."""
    rows = np.zeros(count, ROW)
    rows["mask"] = -1
    return rows
