"""A job's time limits: the endpoint's, or those of `policy` in the client's request."""

from dataclasses import dataclass, replace
from typing import Any, Self

MIN_EXECUTION_TIMEOUT_MS = 5_000
MIN_TTL_MS = 10_000
MAX_MS = 7 * 24 * 3600 * 1000
"""A week, for both limits."""


@dataclass(frozen=True)
class Policy:
    """Limits in seconds; the defaults are RunPod's."""

    execution_timeout_s: float = 600.0
    """Maximum time from the moment when a worker takes the job. Then the job is stopped and
    TIMED_OUT."""
    ttl_s: float = 86_400.0
    """Maximum time from the moment when the client sends the job. A waiting job is then TIMED_OUT;
    a running one is stopped and deleted."""

    def with_request(self, request: dict[str, Any]) -> Self:
        """Returns these limits, replaced by those in `request` (in milliseconds). Raises
        `ValueError`."""
        given = request.get("policy") or {}
        if not isinstance(given, dict):
            raise ValueError("policy must be an object")
        changed = self
        if (timeout := given.get("executionTimeout")) is not None:
            seconds = _seconds("executionTimeout", timeout, MIN_EXECUTION_TIMEOUT_MS)
            changed = replace(changed, execution_timeout_s=seconds)
        if (ttl := given.get("ttl")) is not None:
            changed = replace(changed, ttl_s=_seconds("ttl", ttl, MIN_TTL_MS))
        return changed


def _seconds(name: str, value: Any, least_ms: int) -> float:
    # That RunPod refuses a value out of range, and how, is a guess.
    if not isinstance(value, int | float) or not least_ms <= value <= MAX_MS:
        raise ValueError(f"policy.{name} must be {least_ms} to {MAX_MS} ms")
    return value / 1000
