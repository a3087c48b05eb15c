"""Computes perplexity and divergence from next-token distributions."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

ROWS = 256
"""Number of distributions that are compared at once: 66 MB in float64 for Mixtral's vocabulary."""
ITEM_BYTES = 4


class LogProbs:
    """Natural logarithms of next-token probabilities, float32 `[tokens, vocab_size]`, in a file.

    With Mixtral's vocabulary, 2,000 tokens take 256 MB. The file keeps a model's distributions
    after the model is freed, because two models may not fit into memory.
    """

    def __init__(self, path: Path, num_tokens: int, vocab_size: int) -> None:
        import numpy as np

        self._table = np.memmap(path, np.float32, "w+", shape=(num_tokens, vocab_size))
        self._num_rows = 0

    def add(self, logits: "torch.Tensor") -> int:
        """Appends the distributions of `logits` `[n, vocab_size]`. Returns the number of rows."""
        start, self._num_rows = self._num_rows, self._num_rows + len(logits)
        rows = logits.float().log_softmax(-1).cpu()
        self._table[start : self._num_rows] = rows.numpy()
        return self._num_rows

    def parts(self) -> "Iterator[torch.Tensor]":
        """Yields all rows in order, as float64, `ROWS` at a time."""
        import torch

        assert self._num_rows == len(self._table), (
            "a side has fewer distributions than the text has tokens"
        )
        for start in range(0, len(self._table), ROWS):
            yield torch.from_numpy(self._table[start : start + ROWS].astype("float64"))


class Comparison(NamedTuple):
    """The difference between one side's distributions and the reference's."""

    kl_nats_per_token: float
    """The mean of KL(reference || side)."""
    top1_agreement: float
    """Share of the tokens for which both have the same most probable next token."""


def perplexity(side: LogProbs, targets: Sequence[int]) -> float:
    """Returns exp of the mean negative log probability of `targets`."""
    import torch

    total, start = 0.0, 0
    for part in side.parts():
        columns = torch.tensor(targets[start : start + len(part)])[:, None]
        total -= float(part.gather(1, columns).sum())
        start += len(part)
    return math.exp(total / len(targets))


def compare(reference: LogProbs, side: LogProbs) -> Comparison:
    """Compares two sides' distributions over the same text."""
    divergence, num_equal, num_rows = 0.0, 0, 0
    for p, q in zip(reference.parts(), side.parts(), strict=True):
        divergence += float((p.exp() * (p - q)).sum())
        num_equal += int((p.argmax(-1) == q.argmax(-1)).sum())
        num_rows += len(p)
    return Comparison(divergence / num_rows, num_equal / num_rows)
