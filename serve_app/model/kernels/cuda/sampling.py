"""SampleKernel: samples a token for each row of logits in one launch on a GPU (`sample.cu`)."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serve_app.model.kernels.cuda.launchable import Launchable, MakeKernel
from serve_app.model.kernels.cuda.launcher import Grid
from serve_app.model.kernels.cuda.variants import Card
from serve_app.model.kernels.unavailable import StepUnavailable

THREADS, CANDIDATES = 1024, 256
"""Number of threads of a block, and maximum number of logits among which a block searches for a
threshold by comparing all pairs."""
MAX_VALUES = 32
"""Maximum number of logits that a thread holds in registers."""
MAX_VOCAB = THREADS * MAX_VALUES
MAX_PARTS, FOUND_BYTES = 16, 16
"""Maximum number of blocks that share a row, and the bytes of each block's result."""
IN_PROMPT = -(1 << 31)
"""The bit of a token's count that marks a token of the prompt."""

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
"""The parameters of a row; sample.cu declares the same. `counts` and `lists` are addresses of int32
tensors on the device. `counts` `[vocab]` has the number of times that each token was generated, and
the bit `IN_PROMPT`; the kernel counts the token that it samples. `lists` has the ids with a bias,
then their biases (float32), then the stop ids. `mask` is the row's index in `masks`, or -1."""


class SampleKernel:
    """The compiled kernel for `vocab_size` tokens and at most `max_rows` rows, and its memory."""

    def __init__(
        self,
        vocab_size: int,
        max_rows: int,
        card: Card,
        device: torch.device,
        make: MakeKernel,
        threads: int = THREADS,
        candidates: int = CANDIDATES,
    ) -> None:
        """Raises `StepUnavailable` if the vocabulary is too large."""
        # The number of blocks that run at once: one per multiprocessor.
        self._blocks, self.max_rows = card.multiprocessors, max_rows
        values = -(-vocab_size // threads)
        if values > MAX_VALUES:
            raise StepUnavailable(f"the vocabulary has more than {threads * MAX_VALUES} tokens")
        macros = [f"THREADS={threads}", f"VALUES={values}", f"CANDIDATES={candidates}"]
        shared = 12 * candidates + threads // 32 * FOUND_BYTES + 8
        grid = Grid(self._blocks, threads, shared, card.overlaps_kernels)
        self._kernel: Launchable = make("sample", macros, grid)
        self._scores = torch.empty(max_rows, vocab_size, device=device)
        shape = (max_rows, MAX_PARTS, FOUND_BYTES)
        self._partial = torch.empty(shape, dtype=torch.uint8, device=device)
        self._arrivals = torch.zeros(max_rows, dtype=torch.int32, device=device)

    def launch(
        self,
        logits: Tensor,
        rows: Tensor,
        positions: Tensor,
        masks: Tensor | None,
        tokens: Tensor,
    ) -> None:
        """Fills `tokens` int64 `[rows]` from float32 `logits` `[rows, vocab]`, without changing
        the logits. `SamplingParams` defines the operations and their order.

        `rows` has one `ROW` per row, as bytes. `positions` int64 `[rows]` has the number of tokens
        that each row has generated. `masks` int32 `[grammars, ceil(vocab / 32)]` has one bit per
        token, 1 if the grammar allows it. A launch with `masks` samples only the rows with a
        `mask`, a launch without them only the others. A row whose logits are not finite gets -1.
        """
        count, vocab_size = logits.shape
        parts = min(MAX_PARTS, max(1, self._blocks // count))
        memory = (self._scores, self._partial, self._arrivals)
        inputs = (logits, rows, positions, masks, tokens)
        self._kernel.launch(*inputs, *memory, parts, vocab_size, blocks=count * parts)


def empty_rows(count: int) -> NDArray[Any]:
    """Returns `count` `ROW`s for greedy sampling."""
    rows = np.zeros(count, ROW)
    rows["mask"] = -1
    return rows
