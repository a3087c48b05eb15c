"""InFlightTokens: the sampled tokens of one step, while they are copied to the host."""

from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from serve_app.engine.delta import TokenLogprob
from serve_app.engine.prompt_scores import PromptScores, best_first
from serve_app.engine.runner import SampledTokens
from serve_app.engine.sequence import Sequence
from serve_app.engine.step_timer import StepTimer
from serve_app.engine.transfer import to_host


class LogprobTensors(NamedTuple):
    """Log probabilities of the sequences that asked for the same number of top tokens, k."""

    rows: list[int]
    """Indices of these sequences in the step's batch."""
    logprobs: Tensor
    """float32 `[rows]`: the log probabilities of the sampled tokens."""
    top_logprobs: Tensor
    """float32 `[rows, k]`: the best log probabilities; the order of equal ones is undefined."""
    top_ids: Tensor
    """int64 `[rows, k]`: the ids of the best tokens."""


class InFlightTokens:
    """An `InFlightStep` whose tokens the sampler has computed on the device."""

    def __init__(
        self, sequences: list[Sequence], tokens: Tensor, logprobs: list[LogprobTensors]
    ) -> None:
        """Starts the copies to the host. The next step may overwrite `tokens`."""
        self.sequences = sequences
        self.timer: StepTimer | None = None
        """The timer of the step; None if the step is not measured."""
        self.prompt_scores: PromptScores | None = None
        """The prompt scores of the same step, if any."""
        self.tokens = tokens
        """int64 `[sequences]` on the device; `FAILED` for logits that are not finite."""
        self._token_ids = to_host(tokens)
        self._logprobs = [
            LogprobTensors(group.rows, *(to_host(tensor) for tensor in group[1:]))
            for group in logprobs
        ]
        self._copied: Any = None
        if not tokens.is_cpu:
            event: Any = torch.cuda.Event  # torch has no types for it
            self._copied = event()
            self._copied.record()

    @cached_property
    def row_of(self) -> dict[Sequence, int]:
        """The index of each sequence in `tokens`."""
        return {sequence: row for row, sequence in enumerate(self.sequences)}

    def wait(self) -> SampledTokens:
        """Returns the tokens. Waits for this step, but not for steps launched after it."""
        if self._copied is not None:
            self._copied.synchronize()
        token_ids: list[int] = self._token_ids.tolist()
        logprobs: dict[int, TokenLogprob] = {}
        for rows, sampled, top_logprobs, top_ids in self._logprobs:
            top = best_first(top_ids.numpy(), top_logprobs.numpy())
            # A view would keep the arrays of the whole batch in memory.
            for row, logprob, ids, values in zip(rows, sampled.tolist(), *top, strict=True):
                logprobs[row] = TokenLogprob(token_ids[row], logprob, ids.copy(), values.copy())
        seconds = self.timer.seconds() if self.timer else 0.0
        scores = self.prompt_scores.wait() if self.prompt_scores else []
        return SampledTokens(token_ids, logprobs, seconds, scores)
