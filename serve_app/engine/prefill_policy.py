"""PrefillPolicy: how many prompt tokens a step computes beside running streams.

A stream waits for its next token as long as prompt tokens and the decodes beside them take: in one
step on a CPU; on a device that overlaps steps, in a step of prefill chunks and the step of decodes
after it. Three rules follow from the predicted times of steps (`step_cost.py`):

1. Beside running streams, prompt tokens and decodes together take at most `max_stall_s`, save where
   the fixed part or the smallest prefill chunk takes longer.
2. While prompts and streams both wait, prompts get `prefill_share` of the time. Each second of
   steps with prompt tokens owes the streams `(1 - prefill_share) / prefill_share` seconds of steps
   without. Prompts wait once more than `BURST_S` seconds are owed, so a single prompt never waits.
3. Without running streams, prompts get whole steps.

A step is charged with its predicted time when it is launched, because the next one is scheduled
before its time is known; the difference is charged when the step is done.
"""

from typing import Protocol

from serve_app.engine.step_cost import StepCost, StepShape

MIN_SHARE = 32
"""The first prefill chunk of a step has at least 1/32 of `max_num_batched_tokens`. Each step with
prompt tokens has a fixed cost, so with very small chunks prompts would take longest in total."""
BURST_S = 1.0
"""Seconds that may be owed to the streams before prompts wait. With less, a short prompt waits
because a long one came just before it; with more, streams wait longer after a burst of prompts."""


class PrefillBudget:
    """The prompt tokens that one step may still take."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens

    @property
    def is_open(self) -> bool:
        """Whether a prompt may get tokens."""
        return self._num_tokens > 0

    def take(self, start: int, num_tokens: int) -> int:
        """How many of the `num_tokens` prompt tokens from `start` on the step takes; may be 0."""
        taken = min(num_tokens, self._num_tokens)
        # A budget that cannot give all tokens is spent, even if a token of another prompt would
        # fit: a prompt that is admitted holds KV blocks.
        self._num_tokens = self._num_tokens - taken if taken == num_tokens else 0
        return taken


class TimedBudget(PrefillBudget):
    """A budget that also limits the time that prompt tokens add to the step."""

    def __init__(self, num_tokens: int, min_tokens: int, seconds: float, cost: StepCost) -> None:
        """The first chunk may have `min_tokens` tokens even if these take more than `seconds`."""
        super().__init__(num_tokens)
        self._min_tokens = min_tokens
        self._seconds = seconds
        self._cost = cost

    @property
    def is_open(self) -> bool:
        """See `PrefillBudget`."""
        return super().is_open and (self._seconds > 0 or self._min_tokens > 0)

    def take(self, start: int, num_tokens: int) -> int:
        """See `PrefillBudget`."""
        fitting = max(self._cost.num_tokens(start, self._seconds), self._min_tokens)
        self._num_tokens = min(self._num_tokens, fitting)
        taken = super().take(start, num_tokens)
        self._seconds -= self._cost.chunk_seconds(start, taken)
        self._min_tokens = 0
        return taken


class Policy(Protocol):
    """Decides how many prompt tokens a step takes."""

    def budget(self, decodes: StepShape, max_tokens: int) -> PrefillBudget:
        """The budget for `max_tokens` prompt tokens at most, in a step with `decodes` or before it.

        It must be open where `decodes` is empty and `max_tokens` is not 0; otherwise the engine
        would have work and compute nothing.
        """
        ...

    def launched(self, shape: StepShape) -> float:
        """Records that a step is launched; returns its predicted seconds."""
        ...

    def finished(self, shape: StepShape, predicted_s: float, seconds: float) -> None:
        """Records the time that the device worked on a launched step."""
        ...


class PrefillPolicy:
    """The `Policy` of the three rules above."""

    def __init__(
        self,
        max_num_batched_tokens: int,
        max_stall_s: float,
        prefill_share: float,
        few_tokens: int = 0,
    ) -> None:
        """`few_tokens`: see `StepCost`."""
        self.cost = StepCost(few_tokens)
        self._min_tokens = max(1, max_num_batched_tokens // MIN_SHARE)
        self._max_stall_s = max_stall_s
        # Seconds of decode steps for each second of steps with prompt tokens.
        self._ratio = (1 - prefill_share) / prefill_share
        # Seconds of decode steps that the streams are owed.
        self._owed_s = 0.0
        # Whether streams waited when prompt tokens were last scheduled.
        self._has_streams = False

    def budget(self, decodes: StepShape, max_tokens: int) -> PrefillBudget:
        """See `Policy`."""
        self._has_streams = decodes.num_decodes > 0
        if not self._has_streams:
            self._owed_s = 0.0
            return PrefillBudget(max_tokens)
        if self._owed_s > BURST_S:
            return PrefillBudget(0)
        without_tokens = self.cost.seconds(decodes._replace(num_prompt_tokens=1))
        left_s = self._max_stall_s - without_tokens
        return TimedBudget(max_tokens, self._min_tokens, left_s, self.cost)

    def launched(self, shape: StepShape) -> float:
        """See `Policy`."""
        predicted_s = self.cost.seconds(shape)
        self._charge(shape, predicted_s)
        return predicted_s

    def finished(self, shape: StepShape, predicted_s: float, seconds: float) -> None:
        """See `Policy`."""
        self.cost.observe(shape, seconds)
        self._charge(shape, seconds - predicted_s)

    def _charge(self, shape: StepShape, seconds: float) -> None:
        if not shape.num_prompt_tokens:
            self._owed_s -= seconds
        elif shape.num_decodes or self._has_streams:
            self._owed_s += seconds * self._ratio
        # One very slow step must not stop prompts for long.
        largest = BURST_S + self._max_stall_s * max(self._ratio, 1.0)
        self._owed_s = min(max(self._owed_s, 0.0), largest)
