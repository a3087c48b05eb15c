"""Medians over rounds of several servers, ratios of ours to theirs, and targets.

A round is the levels of one server, `{concurrency: level}`, as `latency.summarize` returns them.
"""

from statistics import median
from typing import Any

Round = dict[int, dict[str, Any]]

OURS = "ours"
OURS_DIRECT = "ours, HAProxy"
"""Our server in Serve's HAProxy mode instead of Serve's own proxy."""
FASTER = {"vllm": 1.5, "transformers": 2.0, "llama.cpp": 1.0}
"""Targets: our tokens per second as a multiple of a peer's; llama.cpp's is a stretch."""


def medians(rounds: list[Round]) -> Round:
    """Per concurrency, the median of each figure over the rounds, and the sum of errors."""
    return {
        concurrency: {
            "concurrency": concurrency,
            "tokens_per_s": round(median(each[concurrency]["tokens_per_s"] for each in rounds), 1),
            **{
                times: {
                    quantile: round(median(found), 2)
                    for quantile in ("p50", "p95", "p99")
                    if (found := _present(rounds, concurrency, times, quantile))
                }
                for times in ("ttft_ms", "inter_token_ms", "end_to_end_ms")
            },
            "errors": sum(each[concurrency]["errors"] for each in rounds),
        }
        for concurrency in rounds[0]
    }


def _present(rounds: list[Round], concurrency: int, times: str, quantile: str) -> list[float]:
    """One figure of all rounds; a round without answers has none."""
    return [
        each[concurrency][times][quantile]
        for each in rounds
        if quantile in each[concurrency][times]
    ]


def ratios(middle: dict[str, Round], of: str = OURS) -> dict[str, dict[int, dict[str, float]]]:
    """Ours divided by each peer: tokens per second (more is better), p99 of TTFT (less is)."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for name in middle.keys() - {OURS, OURS_DIRECT}:
        found[name] = {}
        for concurrency, theirs in middle[name].items():
            ours = middle[of][concurrency]
            if theirs["tokens_per_s"] and ours["ttft_ms"] and theirs["ttft_ms"]:
                found[name][concurrency] = {
                    "tokens_per_s": round(ours["tokens_per_s"] / theirs["tokens_per_s"], 2),
                    "ttft_p99": round(ours["ttft_ms"]["p99"] / theirs["ttft_ms"]["p99"], 2),
                }
    return found


def targets(compared: dict[str, dict[int, dict[str, float]]]) -> list[dict[str, Any]]:
    """Each target, the ratio that was found and whether it was met."""
    found: list[dict[str, Any]] = []
    for name, wanted in FASTER.items():
        for concurrency, ratio in compared.get(name, {}).items():
            place = {"peer": name, "concurrency": concurrency}
            speed = ratio["tokens_per_s"]
            found.append(
                {**place, "at_least": wanted, "tokens_per_s": speed, "met": speed >= wanted}
            )
            if name == "vllm":
                wait = ratio["ttft_p99"]
                found.append({**place, "at_most": 1.0, "ttft_p99": wait, "met": wait <= 1})
    return found


def likeness(ours: str, theirs: str) -> float:
    """The share of the longer answer that both have in common from the beginning.

    Surrounding spaces are ignored, because servers treat them differently.
    """
    a, b = ours.strip(), theirs.strip()
    same = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    longer = max(len(a), len(b), 1)
    return round((min(len(a), len(b)) if same is None else same) / longer, 3)
