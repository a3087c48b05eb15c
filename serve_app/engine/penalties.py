"""Penalties: presence, frequency and repetition penalties over a batch.

Token counts are a matrix with one row per sequence. A new batch copies the rows of the sequences
that were in the last batch. Each step counts only the tokens since the previous step.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from serve_app.engine.sequence import Sequence
from serve_app.engine.transfer import floats_to_device, to_device


@dataclass(slots=True)
class _Counts:
    """Token counts of one sequence, kept in `Sequence.sampler_state` between batches."""

    generated: Tensor
    """How often each token was generated, float32 `[vocab]`."""
    prompt: Tensor
    """Whether each token is in the prompt, bool `[vocab]`."""
    num_counted: int
    """Number of leading tokens of the sequence that are counted."""


class Penalties:
    """The penalties of `sequences`, whose logits are the rows `rows` of the batch."""

    def __init__(
        self, rows: list[int], sequences: list[Sequence], vocab_size: int, device: torch.device
    ) -> None:
        def column(values: list[float]) -> Tensor:
            return floats_to_device(values, device)[:, None]

        self._sequences = sequences
        self._rows = to_device(rows, device)
        self._presence = column([s.params.presence_penalty for s in sequences])
        self._frequency = column([s.params.frequency_penalty for s in sequences])
        self._repetition = column([s.params.repetition_penalty for s in sequences])
        self._generated = torch.zeros(len(rows), vocab_size, device=device)
        self._prompt = torch.zeros(len(rows), vocab_size, dtype=torch.bool, device=device)
        for generated, prompt, sequence in zip(
            self._generated, self._prompt, sequences, strict=True
        ):
            counts: _Counts | None = sequence.sampler_state
            num_prompt_tokens = sequence.num_prompt_tokens
            if counts is None:
                ids = to_device(sequence.token_ids[:num_prompt_tokens], device)
                prompt.index_fill_(0, ids, True)
                sequence.sampler_state = _Counts(generated, prompt, num_prompt_tokens)
            else:
                generated.copy_(counts.generated)
                prompt.copy_(counts.prompt)
                sequence.sampler_state = _Counts(generated, prompt, counts.num_counted)

    def apply(self, logits: Tensor) -> None:
        """Applies the penalties to `logits` `[batch, vocab]` in place.

        The repetition penalty is CTRL's (arXiv 1909.05858, section 4.1): it divides positive logits
        and multiplies negative ones. Presence and frequency penalties are OpenAI's.
        """
        self._count()
        scores = logits[self._rows]
        is_generated = self._generated > 0
        repeated = torch.where(scores < 0, scores * self._repetition, scores / self._repetition)
        scores = torch.where(is_generated | self._prompt, repeated, scores)
        scores -= self._frequency * self._generated + self._presence * is_generated
        logits[self._rows] = scores

    def _count(self) -> None:
        """Counts the tokens that were generated since the last call."""
        rows: list[int] = []
        token_ids: list[int] = []
        for row, sequence in enumerate(self._sequences):
            counts: _Counts = sequence.sampler_state
            new = sequence.token_ids[counts.num_counted :]
            counts.num_counted += len(new)
            token_ids += new
            rows += [row] * len(new)
        if rows:
            where = to_device([*rows, *token_ids], self._generated.device).view(2, -1)
            increment = torch.ones((), device=self._generated.device)
            self._generated.index_put_((where[0], where[1]), increment, accumulate=True)
