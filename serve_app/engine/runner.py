"""Runner: the interface between the engine's core and the device that computes its steps."""

from collections.abc import Collection
from typing import NamedTuple, Protocol

from serve_app.engine.delta import PromptLogprobs, TokenLogprob
from serve_app.engine.scheduled_tokens import ScheduledTokens
from serve_app.engine.sequence import Sequence


class SampledTokens(NamedTuple):
    """What a step returns: one token for each sequence that it samples, in the step's order."""

    token_ids: list[int]
    """`FAILED` where the logits were not finite."""
    logprobs: dict[int, TokenLogprob]
    """By index into `token_ids`, for the sequences that asked for log probabilities."""
    seconds: float = 0.0
    """How long the device worked on the step; 0 where a runner does not measure it."""
    prompt_logprobs: Collection[tuple[Sequence, PromptLogprobs]] = ()
    """What the step has scored, with the sequence of each prompt."""


class InFlightStep(Protocol):
    """A step that has been launched and may still be running on the device."""

    def wait(self) -> SampledTokens:
        """Waits until the step is done; raises the error with which it failed."""
        ...


class Runner(Protocol):
    """Computes steps. All methods are called from the engine's thread."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def can_overlap_steps(self) -> bool:
        """Whether `launch` returns before the step is done, so that the next step can be launched
        before the last one's tokens are known (async scheduling). True on a GPU, false on a CPU."""
        ...

    @property
    def few_prompt_tokens(self) -> int:
        """The most prompt tokens of a step that is computed in another way than larger ones, so
        that its time is predicted apart; 0 where all are computed alike."""
        ...

    def launch(self, scheduled: list[ScheduledTokens]) -> InFlightStep:
        """Starts a step over `scheduled`, which is not empty; steps run in the order of launch.

        Where steps overlap, `scheduled` has decodes alone or prefill chunks alone.

        A token id that is `PENDING` stands for the token that the last launched step samples for
        that sequence.
        """
        ...

    def clear_blocks(self, blocks: list[int]) -> None:
        """Zeroes KV blocks that may hold numbers that are not finite.

        Attention multiplies masked slots by 0, so a NaN would reach the block's next owner.
        """
        ...
