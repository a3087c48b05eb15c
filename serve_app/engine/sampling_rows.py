"""SamplingRows: the sampling parameters of a batch in the layout of the GPU's sampling kernel."""

from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serve_app.engine.sampling_metadata import MIN_TEMPERATURE, LogprobRows
from serve_app.engine.sequence import Sequence
from serve_app.engine.transfer import tensor_to_device
from serve_app.model.kernels.cuda.sampling import IN_PROMPT, ROW, empty_rows

COPIED_FIELDS = {
    "top_p": "top_p",
    "presence": "presence_penalty",
    "frequency": "frequency_penalty",
    "repetition": "repetition_penalty",
    "min_tokens": "min_tokens",
}
"""Columns of `ROW` that are copied from fields of `SamplingParams`."""


class SamplingRows:
    """The rows of at most `max_rows` sequences, in a tensor whose address does not change."""

    def __init__(self, max_rows: int, vocab_size: int, device: torch.device) -> None:
        self._max_rows, self._vocab_size, self._device = max_rows, vocab_size, device
        self.tensor = torch.zeros(max_rows * ROW.itemsize, dtype=torch.uint8, device=device)
        """The rows as bytes, uint8 `[max_rows * ROW.itemsize]`. Rows after the batch are greedy."""
        self.logprobs: LogprobRows | None = None
        """The rows that ask for log probabilities; None if no row does."""
        self.constrained: list[Sequence] = []
        """The sequences with a grammar, in the order of their masks."""
        self._sequences: list[Sequence] = []
        # Keeps the tensors alive whose addresses are in the rows.
        self._kept: list[Tensor] = []
        self._write(empty_rows(max_rows))

    def update(self, sequences: list[Sequence]) -> None:
        """Writes the rows of `sequences` if the batch has changed. Does not wait for the device."""
        if sequences == self._sequences:
            return
        rows = empty_rows(self._max_rows)
        self._kept = self._fill(rows[: len(sequences)], sequences)
        self.constrained = [s for s in sequences if s.constraint is not None]
        counts = [s.params.logprobs for s in sequences]
        is_asked = any(count is not None for count in counts)
        self.logprobs = LogprobRows(counts, self._device) if is_asked else None
        self._write(rows)
        self._sequences = list(sequences)

    def _write(self, rows: NDArray[Any]) -> None:
        self.tensor.copy_(_uploaded(rows.view(np.uint8), self._device))

    def _fill(self, rows: NDArray[Any], sequences: list[Sequence]) -> list[Tensor]:
        """Fills `rows`. Returns the tensors whose addresses it has written into them."""
        params = [sequence.params for sequence in sequences]
        temperatures = np.array([p.temperature for p in params])
        is_random = temperatures >= MIN_TEMPERATURE
        for column, name in COPIED_FIELDS.items():
            rows[column] = [getattr(p, name) for p in params]
        rows["seed"] = [s.seed % (1 << 64) for s in sequences]
        rows["temperature"] = np.where(is_random, temperatures, 0)
        rows["is_filtered"] = is_random & [p.is_filtered for p in params]
        rows["top_k"] = [p.top_k if p.top_k < self._vocab_size else 0 for p in params]
        # torch's logarithm, for the same rounding as in `TopFilter`.
        rows["log_min_p"] = torch.tensor([p.min_p for p in params], dtype=torch.float32).log()
        has_mask = np.array([s.constraint is not None for s in sequences])
        rows["mask"] = np.where(has_mask, has_mask.cumsum() - 1, -1)
        counts = [self._counts(s) if s.has_penalties else None for s in sequences]
        rows["counts"] = [0 if tensor is None else tensor.data_ptr() for tensor in counts]
        lists = self._fill_lists(rows, sequences)
        return [lists, *(tensor for tensor in counts if tensor is not None)]

    def _fill_lists(self, rows: NDArray[Any], sequences: list[Sequence]) -> Tensor:
        lists = [list_of(sequence) for sequence in sequences]
        starts = [0, *accumulate(map(len, lists))]
        tensor = _uploaded(np.concatenate(lists), self._device)
        rows["lists"] = [tensor.data_ptr() + 4 * start for start in starts[:-1]]
        rows["num_biases"] = [len(s.params.logit_bias) for s in sequences]
        rows["num_stops"] = [len(s.stop_ids) if s.params.min_tokens else 0 for s in sequences]
        return tensor

    def _counts(self, sequence: Sequence) -> Tensor:
        """Returns the count of each generated token, int32 `[vocab]`, on the device.

        The bit `IN_PROMPT` marks tokens of the prompt. The host computes the counts for the first
        token of a sequence; from then on the kernel counts the tokens that it samples.
        """
        if sequence.sampler_state is None:
            ids, prompt = sequence.token_ids, sequence.num_prompt_tokens
            counts = np.bincount(ids[prompt:], minlength=self._vocab_size).astype(np.int32)
            counts[ids[:prompt]] |= IN_PROMPT
            sequence.sampler_state = _uploaded(counts, self._device)
        counted: Tensor = sequence.sampler_state
        return counted


def list_of(sequence: Sequence) -> NDArray[np.int32]:
    """Returns the list of a `ROW`, int32: biased ids, the bits of their float32 biases, stop ids.

    The stop ids are included only with `min_tokens`.
    """
    params = sequence.params
    values = np.array(list(params.logit_bias.values()), np.float32).view(np.int32)
    stops = list(sequence.stop_ids) if params.min_tokens else []
    return np.concatenate((np.array(list(params.logit_bias), np.int32), values, stops)).astype(
        np.int32
    )


def _uploaded(values: NDArray[Any], device: torch.device) -> Tensor:
    return tensor_to_device(torch.from_numpy(values), device)
