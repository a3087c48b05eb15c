"""Sampler: from logits to one token per sequence, each by its own parameters.

All operations work row by row. A request's token depends on its own logits, parameters, seed and
output position alone, so it is exactly the same in any batch.
"""

import numpy as np
import torch
from torch import Tensor

from serve_app.engine.in_flight_tokens import InFlightTokens
from serve_app.engine.sampling_metadata import SamplingMetadata
from serve_app.engine.sequence import FAILED, Sequence


class Sampler:
    """Samples batches of sequences, and keeps the metadata of the last batch."""

    def __init__(self) -> None:
        self._metadata: SamplingMetadata | None = None

    def sample(
        self, logits: Tensor, sequences: list[Sequence], best: Tensor | None = None
    ) -> InFlightTokens:
        """The next token of each sequence from float32 `logits` `[sequences, vocab]`, which are
        overwritten. Does not wait for the device, except to upload the metadata of a new batch.

        The order of operations is in `SamplingParams`. A row with logits that are not finite gives
        `FAILED`. `best` is `best_tokens(logits)` if the caller has computed it.
        """
        if not sequences:
            # The metadata of the decodes around a prefill chunk stay.
            return InFlightTokens([], torch.empty(0, dtype=torch.int64, device=logits.device), [])
        metadata = self._metadata
        if metadata is None or metadata.sequences != sequences:
            metadata = SamplingMetadata(sequences, logits.shape[1], logits.device)
            self._metadata = metadata
        if metadata.is_greedy:
            return InFlightTokens(sequences, best_tokens(logits) if best is None else best, [])
        # The model's own distribution, so before any change to the logits.
        asked = metadata.logprobs
        model_logprobs = [] if asked is None else asked.log_softmax(logits)
        metadata.adjust(logits)
        tokens = best_tokens(logits)
        if metadata.random is not None:
            rows = metadata.random.rows
            tokens[rows] = torch.where(tokens[rows] < 0, FAILED, metadata.random.sample(logits))
        logprobs = [] if asked is None else asked.gather(model_logprobs, tokens)
        return InFlightTokens(sequences, tokens, logprobs)


def best_tokens(logits: Tensor) -> Tensor:
    """The token of the best logit per row, int64 `[rows]` from `logits` `[rows, vocab]`; `FAILED`
    for rows that are not finite."""
    # A NaN wins every maximum, so the row is finite when its best logit is.
    if logits.is_cuda:
        best, tokens = logits.max(-1)
        # `masked_fill_` takes the number as it is; `where` would copy it to the device.
        return tokens.masked_fill_(~best.isfinite(), FAILED)
    # On a CPU numpy's argmax is ten times as fast.
    host = logits.numpy()
    ids = host.argmax(-1)
    is_finite = np.isfinite(host[np.arange(len(ids)), ids])
    return torch.from_numpy(np.where(is_finite, ids, FAILED))
