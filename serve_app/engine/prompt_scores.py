"""PromptScores: log probabilities of prompt tokens, computed in the prompt's prefill steps.

The logits of a whole prompt, `[tokens, vocab]`, would need too much memory. So the scheduler scores
at most `MAX_SCORED_TOKENS` tokens in a step, and this module computes the log softmax of
`MAX_PIECE` rows at a time.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serve_app.engine.delta import PromptLogprobs
from serve_app.engine.scheduled_tokens import ScheduledTokens
from serve_app.engine.sequence import Sequence
from serve_app.engine.step_sizes import MAX_PIECE
from serve_app.engine.transfer import to_device, to_host


class _Scored(NamedTuple):
    sequence: Sequence
    token_ids: list[int]
    tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    """Log probabilities and ranks, both `[n]`; log probabilities and ids of the best tokens, both
    `[n, k]`, unsorted. They are on the host, and valid after `wait`."""


class PromptScores:
    """The prompt scores of one step, while they are copied to the host."""

    def __init__(self, scheduled: list[ScheduledTokens], logits: Tensor) -> None:
        """Starts the copies to the host.

        `logits` is `[scored, vocab]`, in the order of `scheduled`. Row i predicts the i-th scored
        token.
        """
        self._scored: list[_Scored] = []
        start = 0
        for part in scheduled:
            if part.num_scored:
                rows = logits[start : start + part.num_scored]
                self._scored.append(_score(part, rows))
                start += part.num_scored
        self._copied: Any = None
        if not logits.is_cpu:
            event: Any = torch.cuda.Event  # torch has no types for it
            self._copied = event()
            self._copied.record()

    def wait(self) -> list[tuple[Sequence, PromptLogprobs]]:
        """Waits for the copies. Returns the scores with the sequence of each prompt."""
        if self._copied is not None:
            self._copied.synchronize()
        scores = []
        for sequence, token_ids, tensors in self._scored:
            logprobs, ranks, top_logprobs, top_ids = (tensor.numpy() for tensor in tensors)
            top = best_first(top_ids, top_logprobs)
            scores.append((sequence, PromptLogprobs(token_ids, logprobs, ranks, *top)))
        return scores


def best_first(
    ids: NDArray[np.int64], logprobs: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Returns both arrays `[n, k]`, with each row sorted by falling log probability, then id."""
    order = np.lexsort((ids, -logprobs), axis=-1)
    return np.take_along_axis(ids, order, -1), np.take_along_axis(logprobs, order, -1)


def _score(part: ScheduledTokens, logits: Tensor) -> _Scored:
    first = part.first_scored
    token_ids = part.sequence.token_ids[first + 1 : first + 1 + part.num_scored]
    num_top = min(part.sequence.params.prompt_logprobs or 0, logits.shape[1])
    targets = to_device(token_ids, logits.device)[:, None]
    pieces: list[tuple[Tensor, ...]] = []
    for rows, row_targets in zip(
        *(torch.split(values, MAX_PIECE) for values in (logits, targets)), strict=True
    ):
        row_logprobs = rows.log_softmax(-1)
        target_logprobs = row_logprobs.gather(1, row_targets)
        ranks = (row_logprobs > target_logprobs).sum(-1) + 1
        top = row_logprobs.topk(num_top)
        pieces.append((target_logprobs[:, 0], ranks, top.values, top.indices))
    logprobs, ranks, top_logprobs, top_ids = (
        to_host(torch.cat(values)) for values in zip(*pieces, strict=True)
    )
    return _Scored(part.sequence, token_ids, (logprobs, ranks, top_logprobs, top_ids))
