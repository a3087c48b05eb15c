"""PrefillPolicy: limits the prompt tokens of a step while streams are running.

A stream waits for its next token while the device computes prompt tokens and the decodes. On a CPU
this is one step. On a device that overlaps steps, it is a step of prefill chunks and the step of
decodes after it. The policy has three rules, which use predicted step times (`step_cost.py`):

1. While streams are running, prompt tokens and decodes together take at most `max_stall_s`. They
   take longer only if the fixed part of a step or the smallest prefill chunk takes longer.
2. While both prompts and streams wait, prompts get `prefill_share` of the time. Each second of
   steps with prompt tokens adds `(1 - prefill_share) / prefill_share` seconds to a debt; each
   second of steps without prompt tokens subtracts one second. Prompts wait while the debt is above
   `BURST_S`, so a single prompt usually does not wait.
3. If no stream is running, prompts get whole steps.

Example with `prefill_share` 0.8 and `max_stall_s` 0.35: steps of 0.35 s with prompt tokens add
0.35 * 0.25 = 0.0875 s each. The debt exceeds `BURST_S` = 1 s after 12 of them (4.2 s). From then on
each of them needs 0.0875 s of decode steps before the next one, which is 20 % of the time.

The policy charges a step with its predicted time when it is launched, because the next step is
scheduled before the real time is known. It charges the difference when the step is done.
"""

from typing import Protocol

from serve_app.engine.step_cost import StepCost, StepShape

MIN_SHARE = 32
"""The first prefill chunk of a step may have 1/32 of `max_num_batched_tokens`, even if it takes
longer than `max_stall_s`. Each step with prompt tokens has a fixed cost, so very small chunks would
make the total time of a prompt long."""
BURST_S = 1.0
"""Prompts wait while the debt to the streams is larger than this, in seconds. With a smaller value,
a short prompt waits because a long one came just before it. With a larger value, streams are slow
for longer after a burst of prompts."""


class PrefillBudget:
    """The number of prompt tokens that may still be added to one step."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens

    @property
    def is_open(self) -> bool:
        """Whether prompt tokens may still be added."""
        return self._num_tokens > 0

    def take(self, start: int, num_tokens: int) -> int:
        """Takes up to `num_tokens` tokens of a prompt from position `start` on.

        Returns the number of tokens that the step computes, which may be 0.
        """
        num_taken = min(num_tokens, self._num_tokens)
        # If not all tokens fit, the budget closes. Otherwise a shorter prompt would be admitted and
        # would hold KV blocks.
        self._num_tokens = self._num_tokens - num_taken if num_taken == num_tokens else 0
        return num_taken


class TimedBudget(PrefillBudget):
    """A budget that also limits the time that prompt tokens add to the step."""

    def __init__(self, num_tokens: int, min_tokens: int, seconds: float, cost: StepCost) -> None:
        """`num_tokens` and `seconds` limit all chunks of the step together. The first chunk may
        have `min_tokens` tokens even if they take more than `seconds`."""
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
        num_taken = super().take(start, num_tokens)
        self._seconds -= self._cost.chunk_seconds(start, num_taken)
        self._min_tokens = 0
        return num_taken


class Policy(Protocol):
    """Decides how many prompt tokens a step computes."""

    def budget(self, decodes: StepShape, max_tokens: int) -> PrefillBudget:
        """Returns a budget of at most `max_tokens` prompt tokens for a step.

        `decodes` are the decodes in the same step, or in the step after it if steps overlap. The
        budget must be open if `decodes` is empty and `max_tokens` is not 0; otherwise the engine
        would have work and compute nothing.
        """
        ...

    def launched(self, shape: StepShape) -> float:
        """Records that a step is launched. Returns its predicted time in seconds."""
        ...

    def finished(self, shape: StepShape, predicted_s: float, seconds: float) -> None:
        """Records the measured device time of a launched step, in seconds.

        `predicted_s` is the result of `launched` for the step.
        """
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
        # The debt of rule 2, in seconds of decode steps.
        self._debt_s = 0.0
        # Whether streams were running when prompt tokens were last scheduled.
        self._has_streams = False

    def budget(self, decodes: StepShape, max_tokens: int) -> PrefillBudget:
        """See `Policy`."""
        self._has_streams = decodes.num_decodes > 0
        if not self._has_streams:
            self._debt_s = 0.0
            return PrefillBudget(max_tokens)
        if self._debt_s > BURST_S:
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
            self._debt_s -= seconds
        elif shape.num_decodes or self._has_streams:
            self._debt_s += seconds * self._ratio
        # One very slow step must not stop prompts for long.
        largest = BURST_S + self._max_stall_s * max(self._ratio, 1.0)
        self._debt_s = min(max(self._debt_s, 0.0), largest)
