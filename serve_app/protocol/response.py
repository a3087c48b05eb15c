"""What the responses of several routes have in common: metadata, usage, log probabilities."""

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
    """`system_fingerprint`: equal for servers of one version, model and format."""


class TokenNames(Protocol):
    """The part of the tokenizer that `logprobs` needs."""

    def token_bytes(self, token_id: int) -> bytes: ...


MIN_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have (vLLM's number)."""


def finite(logprob: float) -> float:
    """`logprob` as a JSON number. Raises `ValueError` for NaN."""
    if logprob != logprob:
        raise ValueError("a log probability is NaN")
    return max(logprob, MIN_LOGPROB)


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """OpenAI's `usage` object, without details."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def detailed_usage(
    prompt_tokens: int, completion_tokens: int, cached_tokens: int
) -> dict[str, Any]:
    """OpenAI's `usage` object; `cached_tokens` of the prompts were found in the prefix cache."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
