"""What rounds of several servers come to: medians, ratios to ours, targets met or missed.

A round is one server's levels, `{concurrency: level}` as `waiting.summarise` gives them. Knows no
server but by name.
"""

from statistics import median
from typing import Any

Round = dict[int, dict[str, Any]]

OURS = "ours"
OURS_DIRECT = "ours, HAProxy"
"""With Serve's HAProxy mode, a switch, in place of Serve's own proxy."""
FASTER = {"vllm": 1.5, "transformers": 2.0, "llama.cpp": 1.0}
"""How many times a peer's tokens a second ours aims at; llama.cpp's is a stretch."""


def medians(rounds: list[Round]) -> Round:
    """Per concurrency the median of each figure over the rounds, and all errors."""
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
    """A round in which every request failed has no times."""
    return [
        each[concurrency][times][quantile]
        for each in rounds
        if quantile in each[concurrency][times]
    ]


def ratios(middle: dict[str, Round], of: str = OURS) -> dict[str, dict[int, dict[str, float]]]:
    """One of ours beside each peer: tokens a second (more is better), p99 of TTFT (less is)."""
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
    """How far two answers are the same, from their beginning: a share of the longer one.

    Outer spaces do not count, which servers treat each in its way.
    """
    a, b = ours.strip(), theirs.strip()
    same = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    longer = max(len(a), len(b), 1)
    return round((min(len(a), len(b)) if same is None else same) / longer, 3)
