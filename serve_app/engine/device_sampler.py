"""DeviceSampler: a `Sampler` for GPUs in one kernel launch, which a CUDA graph can contain.

Rows with a grammar are sampled by a second launch, because the host computes their token masks
while the device computes the logits.
"""

import numpy as np
import torch
from torch import Tensor

from serve_app.engine.in_flight_tokens import InFlightTokens
from serve_app.engine.sampling_rows import SamplingRows
from serve_app.engine.sequence import Sequence
from serve_app.engine.transfer import tensor_to_device, to_device
from serve_app.model.kernels.cuda.sampling import SampleKernel


class DeviceSampler:
    """Samples batches of up to `kernel.max_rows` sequences, with the same tokens as `Sampler`."""

    def __init__(self, kernel: SampleKernel, vocab_size: int, device: torch.device) -> None:
        max_rows = kernel.max_rows
        self._kernel, self._vocab_size, self._device = kernel, vocab_size, device
        # Two objects, because decodes and prefill chunks alternate and each keeps its last batch.
        self._captured = SamplingRows(max_rows, vocab_size, device)
        self._others = SamplingRows(max_rows, vocab_size, device)

    def prepare(self, sequences: list[Sequence]) -> None:
        """Makes `sequences` the batch of `launch`."""
        self._captured.update(sequences)

    def launch(self, logits: Tensor, positions: Tensor, tokens: Tensor) -> None:
        """Samples the rows without a grammar from float32 `logits` `[rows, vocab]`.

        Writes the tokens to `tokens`, int64 `[rows]`. `positions` is int64 `[rows]`: the number of
        tokens that each row has generated.
        """
        self._kernel.launch(logits, self._captured.tensor, positions, None, tokens)

    def sample(
        self, logits: Tensor, sequences: list[Sequence], tokens: Tensor | None = None
    ) -> InFlightTokens:
        """Samples the next token of each sequence from float32 `logits` `[sequences, vocab]`.

        `tokens` is the output of `launch` for the same logits and sequences, if it was called.
        """
        if not sequences:
            return InFlightTokens([], torch.empty(0, dtype=torch.int64, device=logits.device), [])
        logits = logits.contiguous()
        positions = to_device([s.num_output_tokens for s in sequences], self._device)
        rows = self._captured
        if tokens is None:
            rows = self._others
            rows.update(sequences)
            tokens = torch.empty_like(positions)
            if len(rows.constrained) < len(sequences):
                self._kernel.launch(logits, rows.tensor, positions, None, tokens)
        if rows.constrained:
            masks = self._masks(rows.constrained)
            self._kernel.launch(logits, rows.tensor, positions, masks, tokens)
        logprobs = []
        if rows.logprobs is not None:
            logprobs = rows.logprobs.gather(rows.logprobs.log_softmax(logits), tokens)
        return InFlightTokens(sequences, tokens, logprobs)

    def _masks(self, constrained: list[Sequence]) -> Tensor:
        """Returns one bit per allowed token, int32 `[sequences, ceil(vocab / 32)]`."""
        allowed = np.zeros((len(constrained), -(-self._vocab_size // 32)), np.int32)
        for row, sequence in zip(allowed, constrained, strict=True):
            assert sequence.constraint is not None
            sequence.constraint.fill(row)
        return tensor_to_device(torch.from_numpy(allowed), self._device)
