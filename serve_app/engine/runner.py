"""Runner: the interface between the engine's core and the device that computes its steps."""

from collections.abc import Collection
from typing import NamedTuple, Protocol

from serve_app.engine.delta import PromptLogprobs, TokenLogprob
from serve_app.engine.scheduled_tokens import ScheduledTokens
from serve_app.engine.sequence import Sequence


class SampledTokens(NamedTuple):
    """The result of a step: one token for each sampled sequence, in the order of the step."""

    token_ids: list[int]
    """The sampled tokens; `FAILED` for logits that are not finite."""
    logprobs: dict[int, TokenLogprob]
    """Log probabilities by index into `token_ids`, for the sequences that asked for them."""
    seconds: float = 0.0
    """Device time of the step in seconds; 0 if the runner does not measure it."""
    prompt_logprobs: Collection[tuple[Sequence, PromptLogprobs]] = ()
    """The prompt scores of the step, each with its sequence."""


class InFlightStep(Protocol):
    """A step that has been launched and may still be running on the device."""

    def wait(self) -> SampledTokens:
        """Waits until the step is done. Raises the step's error if it failed."""
        ...


class Runner(Protocol):
    """Computes steps. All methods are called from the engine's thread."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        ...

    @property
    def can_overlap_steps(self) -> bool:
        """Whether `launch` returns before the step is done. Then the next step can be launched
        before the last step's tokens are known (async scheduling)."""
        ...

    @property
    def few_prompt_tokens(self) -> int:
        """Maximum number of prompt tokens of a step that uses the kernels for small steps. The time
        of these steps is predicted separately. 0 if all steps use the same kernels."""
        ...

    def launch(self, scheduled: list[ScheduledTokens]) -> InFlightStep:
        """Starts a step over `scheduled`, which is not empty. Steps run in the order of launch.

        If steps overlap, `scheduled` contains either only decodes or only prefill chunks. A
        `PENDING` token id stands for the token that the last launched step samples for that
        sequence.
        """
        ...

    def clear_blocks(self, blocks: list[int]) -> None:
        """Fills KV blocks with zeros, because they may hold values that are not finite.

        Attention multiplies masked slots by 0, so a NaN would spread to the block's next owner.
        """
        ...
