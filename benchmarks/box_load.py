"""The load on a `BoxServer` over HTTP, beside what `benchmarks.gpu` measured without a server."""

from statistics import median
from typing import Any

import numpy as np

from benchmarks.box_server import TEMPERATURE
from benchmarks.latency import summarize
from benchmarks.load import Outcome, closed_loop
from benchmarks.report import say
from benchmarks.running_server import RunningServer

VOCABULARY = (300, 32000)
"""Ids of Mixtral's vocabulary that are neither control tokens nor bytes."""
FIRST_TOKENS = 4
"""Number of tokens of an answer if only the first one is measured: a single token may have no text
yet."""
REPEATS = 3

Engine = dict[str, Any]
"""The document of `benchmarks.gpu`."""


class BoxLoad:
    """Requests whose prompts have an exact number of tokens, no two of them alike."""

    def __init__(self, server: RunningServer, engine: Engine, answer_tokens: int) -> None:
        self._server, self._engine = server, engine
        self._answer_tokens = answer_tokens
        self._random = np.random.default_rng(0)

    async def _send(
        self, num_tokens: int, answer_tokens: int, concurrency: int, requests: int
    ) -> tuple[list[Outcome], float]:
        """Returns a closed loop with prompts of `num_tokens` random ids."""

        def request(_: int) -> dict[str, Any]:
            ids = self._random.integers(*VOCABULARY, num_tokens).tolist()
            return self._server.body(ids, answer_tokens)

        return await closed_loop(self._server.url, request, concurrency, requests)

    async def warm_up(self, context: int) -> None:
        """Sends two requests, which are not counted."""
        await self._send(context, FIRST_TOKENS, 2, 2)

    async def prompts(self, sizes: list[int]) -> list[dict[str, Any]]:
        """Returns the time to the first token of prompts, sent one after another, and the engine's
        time."""
        say(f"{'prompt':>7} {'first ms':>9} {'engine ms':>10}")
        rows = []
        for size in sizes:
            found = summarize(*await self._send(size, FIRST_TOKENS, 1, REPEATS))
            times = {
                "first_token_ms": found["ttft_ms"].get("p50"),
                "engine_ms": self._engine_prompt_ms(size),
            }
            first_ms, engine_ms = (each or "-" for each in times.values())
            say(f"{size:>7} {first_ms:>9} {engine_ms:>10}")
            rows.append({"tokens": size, **times, "errors": found["errors"]})
        return rows

    async def streams(self, counts: list[int], context: int) -> list[dict[str, Any]]:
        """Runs closed loops of each number of streams with prompts of `context` tokens, and returns
        their results with the engine's decode steps of as many sequences."""
        say(
            f"{'streams':>7} {'tok/s':>9} {'engine':>9} {'ttft p50':>9} {'p99':>8} "
            f"{'ms/token':>9} {'engine':>8} errors"
        )
        rows = []
        for count in counts:
            requests = max(4, 2 * count)
            outcomes, wall_s = await self._send(context, self._answer_tokens, count, requests)
            row = {"streams": count, **summarize(outcomes, wall_s)}
            row |= {"ms_per_token": ms_per_token(outcomes), **self._engine_decode(count)}
            rows.append(row)
            self._say(row)
        return rows

    def _say(self, row: dict[str, Any]) -> None:
        times = [row["ttft_ms"].get(name, "-") for name in ("p50", "p99")]
        say(
            f"{row['streams']:>7} {row['tokens_per_s']:>9} {row['engine_tokens_per_s'] or '-':>9} "
            f"{times[0]:>9} {times[1]:>8} {row['ms_per_token'] or '-':>9} "
            f"{row['engine_ms_per_step'] or '-':>8} {row['errors']}"
        )

    def _engine_prompt_ms(self, size: int) -> float | None:
        """Returns the engine's time to the first token, if it was measured."""
        rows = self._engine.get("prompts", [])
        alone = (it for it in rows if it["tokens"] == size and not it["streams"])
        return next((it["first_token_ms"] for it in alone), None)

    def _engine_decode(self, count: int) -> dict[str, Any]:
        """Returns the engine's tokens per second and milliseconds per step, if they were
        measured."""
        rows = self._engine.get("decode", [])
        wanted = (count, TEMPERATURE)
        measured = (it for it in rows if (it["batch"], it["temperature"]) == wanted)
        row: dict[str, Any] = next(measured, {})
        return {
            "engine_tokens_per_s": row.get("tokens_per_s"),
            "engine_ms_per_step": row.get("ms_per_step"),
        }


def ms_per_token(outcomes: list[Outcome]) -> float | None:
    """Returns the median over answers of the mean time per token after the first text."""
    found = [
        1e3 * (outcome.arrivals[-1] - outcome.arrivals[0]) / (outcome.num_tokens - 1)
        for outcome in outcomes
        if outcome.error is None and len(outcome.arrivals) > 1
    ]
    return round(median(found), 2) if found else None
