"""Delta: the engine's output for a request, a few tokens at a time."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True, eq=False)
class TokenLogprob:
    """Log probabilities at one position, from the model's logits before penalties.

    k is the number of most probable tokens that the request asked for. Arrays take a twentieth of
    the memory of Python objects.
    """

    token_id: int
    logprob: float
    top_ids: NDArray[np.int64]
    """`[k]`: the ids of the most probable tokens, best first."""
    top_logprobs: NDArray[np.float32]
    """`[k]`: their log probabilities."""


@dataclass(frozen=True, slots=True, eq=False)
class PromptLogprobs:
    """Log probabilities of n successive prompt tokens, each given the tokens before it."""

    token_ids: list[int]
    """The n tokens."""
    logprobs: NDArray[np.float32]
    """`[n]`: their log probabilities."""
    ranks: NDArray[np.int64]
    """`[n]`: the rank of each token in the vocabulary at its position; 1 is the most probable."""
    top_ids: NDArray[np.int64]
    """`[n, k]`: the ids of the k most probable tokens at each position, best first."""
    top_logprobs: NDArray[np.float32]
    """`[n, k]`: their log probabilities."""


@dataclass(slots=True)
class Delta:
    """All new tokens of one request since its last delta. The last delta has a finish reason."""

    token_ids: list[int]
    logprobs: list[TokenLogprob]
    """One entry for each of `token_ids` if the request asked for them, else empty. If the prompt is
    scored, one more entry for the stop token that ended the answer."""
    finish_reason: FinishReason | None = None
    """Set on the last delta only."""
    error: BaseException | None = None
    """The cause if `finish_reason` is "error" or "cancelled"."""
    queued_s: float | None = None
    """Seconds from the request's arrival to its first step; None before that step."""
    num_prompt_cached: int = 0
    """Number of prompt tokens found in the prefix cache and not computed again."""
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)
    """Log probabilities of the next prompt tokens, if the request asked for them. Together, the
    deltas of a request cover all prompt tokens except the first."""

    def extend(self, later: "Delta") -> None:
        """Appends the tokens of `later`, and copies its finish reason and error."""
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.prompt_logprobs += later.prompt_logprobs
        self.finish_reason = later.finish_reason
        self.error = later.error
