"""Sampler: maps logits to one token per sequence, with the parameters of each sequence.

All operations work row by row. The token of a sequence depends only on its own logits, parameters,
seed and output position, so it is exactly the same in any batch.
"""

import numpy as np
import torch
from torch import Tensor

from serve_app.engine.in_flight_tokens import InFlightTokens
from serve_app.engine.sampling_metadata import SamplingMetadata
from serve_app.engine.sequence import FAILED, Sequence


class Sampler:
    """Samples batches of sequences, and reuses the metadata while the batch stays the same."""

    def __init__(self) -> None:
        self._metadata: SamplingMetadata | None = None

    def sample(
        self, logits: Tensor, sequences: list[Sequence], best: Tensor | None = None
    ) -> InFlightTokens:
        """Samples the next token of each sequence from float32 `logits` `[sequences, vocab]`.

        Overwrites `logits`. Does not wait for the device. The order of operations is in
        `SamplingParams`. The result is `FAILED` for a row with logits that are not finite. `best`
        is `best_tokens(logits)` if the caller has computed it.
        """
        if not sequences:
            # Keeps the metadata of the decodes before and after a prefill chunk.
            return InFlightTokens([], torch.empty(0, dtype=torch.int64, device=logits.device), [])
        metadata = self._metadata
        if metadata is None or metadata.sequences != sequences:
            metadata = SamplingMetadata(sequences, logits.shape[1], logits.device)
            self._metadata = metadata
        if metadata.is_greedy:
            return InFlightTokens(sequences, best_tokens(logits) if best is None else best, [])
        # Log probabilities are those of the model, before any change to the logits.
        logprob_rows = metadata.logprobs
        model_logprobs = [] if logprob_rows is None else logprob_rows.log_softmax(logits)
        metadata.adjust(logits)
        tokens = best_tokens(logits)
        if metadata.random is not None:
            rows = metadata.random.rows
            is_failed = tokens[rows] < 0
            tokens[rows] = metadata.random.sample(logits).masked_fill_(is_failed, FAILED)
        logprobs = [] if logprob_rows is None else logprob_rows.gather(model_logprobs, tokens)
        return InFlightTokens(sequences, tokens, logprobs)


def best_tokens(logits: Tensor) -> Tensor:
    """Returns the token with the highest logit of each row of `logits` `[rows, vocab]`.

    The result is int64 `[rows]`, with `FAILED` for rows that are not finite.
    """
    # The maximum of a row with a NaN is NaN, so it shows whether the row is finite.
    if not logits.is_cpu:
        best, tokens = logits.max(-1)
        # `masked_fill_` accepts a Python number; `where` would copy a tensor to the device.
        return tokens.masked_fill_(~best.isfinite(), FAILED)
    # On a CPU numpy's argmax is ten times as fast.
    host = logits.numpy()
    ids = host.argmax(-1)
    is_finite = np.isfinite(host[np.arange(len(ids)), ids])
    return torch.from_numpy(np.where(is_finite, ids, FAILED))
