"""Delta: what the engine returns for a request, a few tokens at a time."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True, eq=False)
class TokenLogprob:
    """Log probabilities at one position, of the model's own distribution (before penalties).

    k is the number of most probable tokens that the request asked for. They stay arrays until they
    are written: a Python object for each takes 20 times the memory.
    """

    token_id: int
    logprob: float
    top_ids: NDArray[np.int64]
    """`[k]`, the most probable tokens, best first."""
    top_logprobs: NDArray[np.float32]
    """`[k]`"""


@dataclass(frozen=True, slots=True, eq=False)
class PromptLogprobs:
    """Log probabilities of n successive tokens of a prompt, each behind the tokens before it."""

    token_ids: list[int]
    logprobs: NDArray[np.float32]
    """`[n]`"""
    ranks: NDArray[np.int64]
    """`[n]`: each token's place among all tokens, 1 for the most probable one."""
    top_ids: NDArray[np.int64]
    """`[n, k]`, best first."""
    top_logprobs: NDArray[np.float32]
    """`[n, k]`"""


@dataclass(slots=True)
class Delta:
    """All new tokens of one request since its last delta. The last delta has a finish reason."""

    token_ids: list[int]
    logprobs: list[TokenLogprob]
    """One for each of `token_ids` when the request asked for them, else empty. Where the prompt is
    scored, one more for a stop token that ends the answer."""
    finish_reason: FinishReason | None = None
    """Set on the last delta only."""
    error: BaseException | None = None
    """The cause when `finish_reason` is "error" or "cancelled"."""
    queued_s: float | None = None
    """Seconds that the request waited for its first step; None before that step."""
    num_prompt_cached: int = 0
    """Tokens of the prompt that were found in the prefix cache, and not computed again."""
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)
    """The next tokens of the prompt, all but its first, where the request asked for them."""

    def extend(self, later: "Delta") -> None:
        """Appends the tokens of `later` and takes over its end."""
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.prompt_logprobs += later.prompt_logprobs
        self.finish_reason = later.finish_reason
        self.error = later.error
