"""Parts of the responses of several routes: metadata, usage, log probabilities."""

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class ResponseMetadata:
    """The fields at the top of every response to one request."""

    id: str
    model: str
    created: int
    """Unix time in seconds."""
    fingerprint: str
    """The `system_fingerprint`, equal for servers with the same version, model and format."""


class TokenNames(Protocol):
    """The part of the tokenizer that `logprobs` needs."""

    def token_bytes(self, token_id: int) -> bytes: ...


MIN_LOGPROB = -9999.0
"""The value for minus infinity, which JSON cannot represent (as in vLLM)."""


def finite(logprob: float) -> float:
    """Returns `logprob` as a JSON number. Raises `ValueError` for NaN."""
    if logprob != logprob:
        raise ValueError("a log probability is NaN")
    return max(logprob, MIN_LOGPROB)


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Returns OpenAI's `usage` object without details."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def detailed_usage(
    prompt_tokens: int, completion_tokens: int, cached_tokens: int
) -> dict[str, Any]:
    """Returns OpenAI's `usage` object with details.

    `cached_tokens` is the number of prompt tokens found in the prefix cache.
    """
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
