"""ScheduledTokens: the part of one sequence that one step computes."""

from typing import NamedTuple

from serve_app.engine.sequence import PENDING, Sequence


class ScheduledTokens(NamedTuple):
    """Tokens `start` to `end` (exclusive) of a sequence.

    A decode is the last token only. A prompt is scheduled as one or more prefill chunks. Example:
    with 512 tokens per step, a prompt of 1,200 tokens gives (0, 512), (512, 1024) and (1024, 1200),
    and the last of them is sampled.
    """

    sequence: Sequence
    start: int
    end: int
    is_sampled: bool
    """Whether the step samples the next token, because `end` is the end of the sequence."""

    @property
    def num_tokens(self) -> int:
        return self.end - self.start

    @property
    def first_scored(self) -> int:
        """Index of the first token whose logits score the next token; see `num_scored`."""
        return max(self.start, self.sequence.num_scored_tokens)

    @property
    def num_scored(self) -> int:
        """Number of successive tokens whose logits score the next prompt token in this step.

        0 if the request asks for no prompt log probabilities, or if they were computed before a
        preemption. Valid until the step is launched.
        """
        if self.sequence.params.prompt_logprobs is None:
            return 0
        last = min(self.end, self.sequence.num_prompt_tokens - 1)
        return max(last - self.first_scored, 0)

    @property
    def is_decode(self) -> bool:
        """Whether this is a single token, and all tokens before it are computed."""
        return self.is_sampled and self.start == self.end - 1


def mark_launched(scheduled: list[ScheduledTokens]) -> None:
    """Counts the tokens of a launched step as computed.

    Appends `PENDING` to each sequence that the step samples.
    """
    for sequence, _, end, is_sampled in scheduled:
        sequence.num_computed_tokens = end
        sequence.num_scored_tokens = max(sequence.num_scored_tokens, end)
        if is_sampled:
            sequence.token_ids.append(PENDING)
