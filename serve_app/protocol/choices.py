"""Several answers to one prompt: the fields `n` and `best_of`, and which answers are returned.

Protocol: https://platform.openai.com/docs/api-reference/completions.
"""

from collections.abc import Sequence
from typing import Any

from pydantic import Field, ValidationInfo, field_validator

from serve_app.errors import InvalidRequest
from serve_app.protocol.field_types import Integer
from serve_app.protocol.fields import Sampling
from serve_app.protocol.response import detailed_usage
from serve_app.protocol.text import TextDelta

MAX_CHOICES = 128


class ChoiceSampling(Sampling):
    """The sampling fields of routes that can return several answers to one prompt.

    With a `seed`, answer i has the seed `seed + i`, as in vLLM.
    """

    n: Integer = Field(default=1, ge=1, le=MAX_CHOICES)
    """Number of choices per prompt."""
    best_of: Integer | None = Field(default=None, ge=1, le=MAX_CHOICES)
    """Number of answers generated per prompt; the `n` best are returned, the best first."""

    @property
    def num_answers(self) -> int:
        """Number of answers generated per prompt."""
        return self.best_of or self.n

    @property
    def is_ranked(self) -> bool:
        """Whether some of the answers are not returned, so that log probabilities are needed."""
        return self.best_of is not None and self.best_of > self.n

    @field_validator("best_of")
    @classmethod
    def _at_least_n(cls, value: int | None, info: ValidationInfo) -> int | None:
        n = info.data.get("n", value)
        if value is None or n is None:
            return value
        if value < n:
            raise InvalidRequest("`best_of` should not be smaller than `n`.", param="best_of")
        if value > n and info.data.get("stream"):
            raise InvalidRequest(
                "`best_of` above `n` cannot be streamed: the best answers are known at the end.",
                param="best_of",
            )
        return value

    def usage(self, num_prompt_tokens: int, wholes: Sequence[TextDelta]) -> dict[str, Any]:
        """Returns the usage of all answers. Each prompt counts once, with the cached tokens of its
        first answer."""
        num_cached_tokens = sum(
            whole.num_cached_tokens for whole in wholes[:: self.best_of or self.n]
        )
        num_tokens = sum(whole.num_tokens for whole in wholes)
        return detailed_usage(num_prompt_tokens, num_tokens, num_cached_tokens)

    def chosen(self, wholes: Sequence[TextDelta]) -> list[TextDelta]:
        """Returns the choices from `num_answers` complete answers per prompt, in the order of
        prompts.

        The best answers have the highest mean log probability per token.
        """
        if self.best_of is None:
            return list(wholes)
        size = self.best_of
        groups = [wholes[start : start + size] for start in range(0, len(wholes), size)]
        best = [sorted(group, key=_mean_logprob, reverse=True)[: self.n] for group in groups]
        return [whole for group in best for whole in group]


def _mean_logprob(whole: TextDelta) -> float:
    if not whole.scores:
        return float("-inf")
    return sum(score.logprob or 0.0 for score in whole.scores) / len(whole.scores)


class StreamUsage:
    """Counts the tokens of the answers of one streamed request."""

    def __init__(self, num_prompt_tokens: int, num_answers: int) -> None:
        """`num_prompt_tokens` counts each prompt once, for any number of answers."""
        self._num_prompt_tokens = num_prompt_tokens
        self._num_running = num_answers
        self._num_tokens = self._num_cached_tokens = 0

    def ended(self, delta: TextDelta, *, is_first: bool) -> dict[str, Any] | None:
        """Counts a finished answer by its last delta. Returns the whole usage after the last
        answer.

        The cached tokens of a prompt are those of its first answer.
        """
        self._num_running -= 1
        self._num_tokens += delta.num_tokens
        self._num_cached_tokens += delta.num_cached_tokens if is_first else 0
        counts = self._num_prompt_tokens, self._num_tokens, self._num_cached_tokens
        return None if self._num_running else detailed_usage(*counts)
