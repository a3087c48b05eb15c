"""The comparison of servers: medians over rounds, ratios of ours to theirs, targets, the table.

A round is the results of one server under every load: `{load: {case: level}}`. A level has the
numbers that `latency.summarize`, `conversations` and `long_prompts` return.
"""

from statistics import median
from typing import Any, NamedTuple

Level = dict[str, Any]
Round = dict[str, dict[str, Level]]

OURS = "ours, HAProxy"
"""Our server in Serve's HAProxy mode, which `mixtral-serve run` uses; targets are judged by it."""
OURS_SERVE = "ours, Serve's proxy"
"""Our server behind Serve's own proxy, which a plain `serve run` uses."""

FIGURES: dict[str, dict[str, tuple[str, ...]]] = {
    "short": {
        "tokens/s": ("tokens_per_s",),
        "first token p50, ms": ("ttft_ms", "p50"),
        "first token p99, ms": ("ttft_ms", "p99"),
        "gap p99, ms": ("inter_token_ms", "p99"),
    },
    "conversations": {
        "tokens/s": ("tokens_per_s",),
        "first token p50, ms": ("ttft_ms", "p50"),
        "first token p99, ms": ("ttft_ms", "p99"),
        "first token of turn 1 p50, ms": ("first_token_ms", "1", "p50"),
        "first token of turn 6 p50, ms": ("first_token_ms", "6", "p50"),
        "turn 6 to turn 1": ("last_turn_to_first",),
        "gap p99, ms": ("inter_token_ms", "p99"),
        "answer p50, ms": ("end_to_end_ms", "p50"),
        "answer p99, ms": ("end_to_end_ms", "p99"),
    },
    "long": {
        "prompt tokens/s": ("prompt_tokens_per_s",),
        "first token p50, ms": ("ttft_ms", "p50"),
        "first token p99, ms": ("ttft_ms", "p99"),
    },
    "beside": {
        "first token p50, ms": ("ttft_ms", "p50"),
        "stream's gap before p99, ms": ("gap_before_ms", "p99"),
        "stream's gap p50, ms": ("gap_during_ms", "p50"),
        "stream's longest gap, ms": ("longest_gap_ms",),
    },
}
"""The figures that are compared under each load: name, and keys of a level."""


class Key(NamedTuple):
    """The path of a number in a level."""

    load: str
    case: str
    figure: str

    def __str__(self) -> str:
        return f"{self.case}: {self.figure}"


class Target(NamedTuple):
    """A bound of one figure under one load."""

    load: str
    figure: str
    bound: float
    is_least: bool
    """Whether the figure must be at least `bound`; else at most."""
    peer: str | None
    """The server by whose number ours is divided; None for our number itself."""


TARGETS = (
    Target("short", "tokens/s", 1.5, True, "vllm"),
    Target("short", "tokens/s", 2.0, True, "transformers"),
    Target("short", "tokens/s", 1.0, True, "llama.cpp"),
    Target("short", "first token p99, ms", 1.0, False, "vllm"),
    Target("conversations", "tokens/s", 1.2, True, "vllm"),
    Target("conversations", "tokens/s", 1.2, True, "llama.cpp"),
    Target("conversations", "turn 6 to turn 1", 2.0, False, None),
    Target("long", "first token p50, ms", 1.0, False, "vllm"),
    Target("long", "first token p99, ms", 1.0, False, "vllm"),
    Target("beside", "stream's longest gap, ms", 350.0, False, None),
)


def medians(rounds: list[Any]) -> Any:
    """Returns the median of each number over the rounds, in the shape of a round; `errors` are
    added.

    A figure that a round lacks, because nothing was answered, is the median of the other rounds.
    """
    if isinstance(rounds[0], dict):
        found = {}
        for key in dict.fromkeys(key for each in rounds for key in each):
            values = [each[key] for each in rounds if key in each]
            found[key] = sum(values) if key == "errors" else medians(values)
        return found
    if isinstance(rounds[0], int | float):
        return round(median(rounds), 2)
    return rounds[0]


def figures(of_server: Round) -> dict[Key, float]:
    """Returns the compared figures of one server; those that it lacks are left out."""
    found = {}
    for load, cases in of_server.items():
        for case, level in cases.items():
            for name, path in FIGURES[load].items():
                value: Any = level
                for key in path:
                    value = value.get(key) if isinstance(value, dict) else None
                if value is not None:
                    found[Key(load, case, name)] = value
    return found


def ratios(ours: dict[Key, float], theirs: dict[Key, float]) -> dict[Key, float]:
    """Returns our numbers divided by a peer's, if both have one and the peer's is not 0."""
    return {key: round(ours[key] / theirs[key], 2) for key in ours if theirs.get(key)}


def targets(ours: dict[Key, float], compared: dict[str, dict[Key, float]]) -> list[dict[str, Any]]:
    """Returns every target in every case of its load, with what was found and whether it was met.

    `compared` has the `ratios` to each peer.
    """
    judged = []
    for target in TARGETS:
        found = ours if target.peer is None else compared.get(target.peer, {})
        for key, value in found.items():
            if (key.load, key.figure) == (target.load, target.figure):
                met = value >= target.bound if target.is_least else value <= target.bound
                kind = "at_least" if target.is_least else "at_most"
                about = {"peer": target.peer, "case": key.case, "figure": key.figure}
                judged.append({**about, kind: target.bound, "found": value, "met": met})
    return judged


def table(servers: dict[str, dict[Key, float]]) -> list[str]:
    """Returns the lines of a Markdown table with a column for each server and a line for each
    figure."""
    keys = dict.fromkeys(key for found in servers.values() for key in found)
    width = max((len(str(key)) for key in keys), default=0)
    lines = [f"| {'':<{width}} | {' | '.join(servers)} |", "|---" * (len(servers) + 1) + "|"]
    for key in keys:
        cells = [f"{found.get(key, '-'):>{len(name)}}" for name, found in servers.items()]
        lines.append(f"| {key!s:<{width}} | {' | '.join(cells)} |")
    return lines


def likeness(ours: str, theirs: str) -> float:
    """Returns the share of the longer answer that both have in common from the beginning.

    Surrounding spaces are ignored, because servers treat them differently.
    """
    a, b = ours.strip(), theirs.strip()
    same = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    longer = max(len(a), len(b), 1)
    return round((min(len(a), len(b)) if same is None else same) / longer, 3)
