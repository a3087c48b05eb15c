"""Delta: what the engine returns for a request, a few tokens at a time."""

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log probabilities at one position, of the model's own distribution (before penalties)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """(token id, log probability) of the most probable tokens, best first."""


@dataclass(slots=True)
class Delta:
    """All new tokens of one request since its last delta. The last delta has a finish reason."""

    token_ids: list[int]
    logprobs: list[TokenLogprob]
    """One for each of `token_ids` when the request asked for them, else empty."""
    finish_reason: FinishReason | None = None
    """Set on the last delta only."""
    error: BaseException | None = None
    """The cause when `finish_reason` is "error" or "cancelled"."""
    queued_s: float | None = None
    """Seconds that the request waited for its first step; None before that step."""

    def extend(self, later: "Delta") -> None:
        """Appends the tokens of `later` and takes over its end."""
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.finish_reason = later.finish_reason
        self.error = later.error
