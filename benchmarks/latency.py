"""Computes the results of a run: tokens per second, latencies, and goodput under an SLO.

Times are in milliseconds at p50, p95 and p99. Inter-token time is the time between two chunks with
text; a chunk has one token unless the server sent several at once.
"""

from collections import Counter
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from benchmarks.load import Outcome


@dataclass(frozen=True)
class Objective:
    """A service level objective: milliseconds to the first text, and per token after it."""

    ttft_ms: float | None = None
    inter_token_ms: float | None = None

    def kept(self, outcome: Outcome) -> bool:
        """Returns whether an answer without error meets the objective. Per token, its own mean
        counts."""
        first, last = outcome.arrivals[0], outcome.arrivals[-1]
        waited = (first - outcome.sent) * 1e3
        each = (last - first) * 1e3 / max(outcome.num_tokens - 1, 1)
        return (self.ttft_ms is None or waited <= self.ttft_ms) and (
            self.inter_token_ms is None or each <= self.inter_token_ms
        )


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Returns p50, p95 and p99 in milliseconds."""
    if not seconds:
        return {}
    values = np.percentile(np.array(seconds) * 1e3, [50, 95, 99])
    return dict(zip(("p50", "p95", "p99"), (round(float(v), 2) for v in values), strict=True))


def summarize(
    outcomes: list[Outcome], wall_s: float, objective: Objective | None = None
) -> dict[str, Any]:
    """Returns the figures of one level of load; with an objective, its goodput too."""
    good = [outcome for outcome in outcomes if outcome.error is None and outcome.arrivals]
    gaps = [
        later - earlier
        for outcome in good
        for earlier, later in zip(outcome.arrivals, outcome.arrivals[1:], strict=False)
    ]
    prompts = [outcome.prompt_tokens for outcome in good if outcome.prompt_tokens is not None]
    found: dict[str, Any] = {
        "requests": len(outcomes),
        "errors": len(outcomes) - len(good),
        "wall_s": round(wall_s, 3),
        "tokens_per_s": round(sum(outcome.num_tokens for outcome in good) / wall_s, 1),
        "prompt_tokens": median(prompts) if prompts else None,
        "counted_by": sorted({outcome.counted_by for outcome in good}),
        "ttft_ms": percentiles([outcome.arrivals[0] - outcome.sent for outcome in good]),
        "inter_token_ms": percentiles(gaps),
        "end_to_end_ms": percentiles([outcome.arrivals[-1] - outcome.sent for outcome in good]),
    }
    if found["errors"]:
        kinds = Counter(outcome.error or "no text" for outcome in outcomes if outcome not in good)
        found["error_kinds"] = dict(kinds)
    if objective is not None:
        kept = [outcome for outcome in good if objective.kept(outcome)]
        found["goodput"] = {
            "requests_per_s": round(len(kept) / wall_s, 3),
            "tokens_per_s": round(sum(outcome.num_tokens for outcome in kept) / wall_s, 1),
            "share": round(len(kept) / len(outcomes), 3) if outcomes else 0.0,
        }
    return found
