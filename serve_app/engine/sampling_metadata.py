"""SamplingMetadata: the sampling parameters of a batch as tensors, one object per operation.

The tensors depend only on the parameters, so they are reused while the batch stays the same.
"""

import torch
from torch import Tensor

from serve_app.engine import noise
from serve_app.engine.in_flight_tokens import LogprobTensors
from serve_app.engine.penalties import Penalties
from serve_app.engine.sequence import Sequence
from serve_app.engine.token_mask import TokenMask
from serve_app.engine.top_filter import TopFilter
from serve_app.engine.transfer import floats_to_device, to_device

MIN_TEMPERATURE = 1e-6
"""Lower temperatures are treated as greedy."""


class SamplingMetadata:
    """The operations on the logits of one batch. Each changes only the rows that use it."""

    def __init__(self, sequences: list[Sequence], vocab_size: int, device: torch.device) -> None:
        self.sequences = list(sequences)
        params = [sequence.params for sequence in sequences]
        self._delayed = [
            (row, s, to_device(list(s.stop_ids), device))
            for row, s in enumerate(sequences)
            if s.params.min_tokens
        ]
        penalized = [row for row, s in enumerate(sequences) if s.has_penalties]
        self._penalties: Penalties | None = None
        if penalized:
            with_penalties = [sequences[row] for row in penalized]
            self._penalties = Penalties(penalized, with_penalties, vocab_size, device)
        constraints = {
            row: s.constraint for row, s in enumerate(sequences) if s.constraint is not None
        }
        self._mask = TokenMask(constraints) if constraints else None
        biases = [(row, *bias) for row, p in enumerate(params) for bias in p.logit_bias.items()]
        self._bias: tuple[Tensor, Tensor, Tensor] | None = None
        if biases:
            rows, ids, values = zip(*biases, strict=True)
            where = to_device([*rows, *ids], device).view(2, -1)
            self._bias = (where[0], where[1], floats_to_device(list(values), device))
        random = [row for row, p in enumerate(params) if p.temperature >= MIN_TEMPERATURE]
        self.random = RandomRows(random, sequences, vocab_size, device) if random else None
        counts = [p.logprobs for p in params]
        self.logprobs = LogprobRows(counts, device) if counts != [None] * len(counts) else None

    @property
    def is_greedy(self) -> bool:
        """Whether every row uses the token with the highest unchanged logit."""
        parts = (self.random, self._bias, self._penalties, self._mask, self.logprobs)
        return not self._delayed and all(part is None for part in parts)

    def adjust(self, logits: Tensor) -> None:
        """Applies logit_bias, penalties, min_tokens and grammars to `logits` `[batch, vocab]`.

        Changes `logits` in place.
        """
        if self._bias is not None:
            rows, ids, values = self._bias
            logits[rows, ids] += values
        if self._penalties is not None:
            self._penalties.apply(logits)
        for row, sequence, stop_ids in self._delayed:
            if sequence.num_output_tokens < sequence.params.min_tokens:
                logits[row].index_fill_(0, stop_ids, -torch.inf)
        if self._mask is not None:
            self._mask.apply(logits)


class RandomRows:
    """The rows of a batch with a temperature above 0."""

    def __init__(
        self, rows: list[int], sequences: list[Sequence], vocab_size: int, device: torch.device
    ) -> None:
        self.rows = to_device(rows, device)
        self._sequences = [sequences[row] for row in rows]
        params = [sequence.params for sequence in self._sequences]
        self._temperature = floats_to_device([p.temperature for p in params], device)[:, None]
        self._seeds = to_device([noise.as_int64(s.seed) for s in self._sequences], device)
        filtered = [row for row, p in enumerate(params) if p.is_filtered]
        self._filtered = to_device(filtered, device) if filtered else None
        self._filter = TopFilter([params[row] for row in filtered], vocab_size, device)

    def sample(self, logits: Tensor) -> Tensor:
        """Returns one token per random row, int64 `[rows]`, from `logits` `[batch, vocab]`."""
        scores = logits[self.rows] / self._temperature
        if self._filtered is not None:
            scores[self._filtered] = self._filter.apply(scores[self._filtered])
        positions = to_device([s.num_output_tokens for s in self._sequences], logits.device)
        noisy_scores = noise.gumbel(self._seeds, positions, logits.shape[1]).add_(scores)
        if not noisy_scores.is_cpu:
            return noisy_scores.argmax(-1)
        # On a CPU numpy's argmax takes a quarter of the time.
        return torch.from_numpy(noisy_scores.numpy().argmax(-1))


class LogprobRows:
    """The rows of a batch that ask for log probabilities, grouped by the number of top tokens."""

    def __init__(self, counts: list[int | None], device: torch.device) -> None:
        """`counts` has the number of top tokens of each row, or None if it asked for none."""
        # A group for each k, because `topk` may choose between equal logits differently for
        # another k.
        self._groups: list[tuple[int, list[int], Tensor]] = []
        for count in sorted({count for count in counts if count is not None}):
            rows = [row for row, num_top in enumerate(counts) if num_top == count]
            self._groups.append((count, rows, to_device(rows, device)))

    def log_softmax(self, logits: Tensor) -> list[Tensor]:
        """Returns log probabilities `[rows, vocab]` per group from `logits` `[batch, vocab]`."""
        return [logits[index].log_softmax(-1) for _, _, index in self._groups]

    def gather(self, logprobs: list[Tensor], tokens: Tensor) -> list[LogprobTensors]:
        """Returns the log probabilities of each group's sampled and top tokens.

        `logprobs` is the result of `log_softmax`, and `tokens` `[batch]` the sampled tokens.
        """
        gathered = []
        for (count, rows, index), group in zip(self._groups, logprobs, strict=True):
            sampled = tokens[index].clamp(min=0)[:, None]  # FAILED (-1) is not a valid index
            top = group.topk(min(count, group.shape[1]))
            sampled_logprobs = group.gather(1, sampled)[:, 0]
            gathered.append(LogprobTensors(rows, sampled_logprobs, top.values, top.indices))
        return gathered
