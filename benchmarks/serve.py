"""A streaming OpenAI load generator: how many tokens a second, and how long people wait.

    python -m benchmarks.serve --url http://127.0.0.1:8000 --concurrency 1 8 16

Closed loop: `concurrency` clients, each sending its next request when the last one ended. Speaks
`/v1/completions` with `stream` and `ignore_eos`, so that every server does the same work. Counts
tokens by the server's own usage; a server without usage is counted by chunks, and the table says
so. Knows nothing about the server but its URL.
"""

import argparse
import asyncio
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from benchmarks.machine import describe

PROMPT = "Count from 1 to 30. What is the capital of France? Spell the word cat. "


@dataclass
class Outcome:
    """One request: times in seconds since the run began."""

    sent: float
    arrivals: list[float] = field(default_factory=list)
    num_tokens: int = 0
    counted_by: str = "usage"
    error: str | None = None


async def complete(
    session: aiohttp.ClientSession, url: str, body: dict[str, Any], start: float
) -> Outcome:
    """Sends one streaming request and notes when each chunk with text came."""
    outcome = Outcome(sent=time.perf_counter() - start)
    chunks = 0
    usage: int | None = None
    try:
        async with session.post(f"{url}/v1/completions", json=body) as response:
            if response.status != 200:
                outcome.error = f"status {response.status}"
                return outcome
            async for line in response.content:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    outcome.error = str(event["error"].get("code"))
                    return outcome
                if event.get("usage"):
                    usage = event["usage"]["completion_tokens"]
                if any(choice.get("text") for choice in event.get("choices", [])):
                    outcome.arrivals.append(time.perf_counter() - start)
                    chunks += 1
    except aiohttp.ClientError as error:
        outcome.error = type(error).__name__
    outcome.num_tokens = chunks if usage is None else usage
    outcome.counted_by = "chunks" if usage is None else "usage"
    return outcome


async def closed_loop(
    url: str, body: dict[str, Any], concurrency: int, requests: int
) -> tuple[list[Outcome], float]:
    """Runs `requests` requests, `concurrency` of them at any time; returns outcomes and seconds."""
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None, sock_read=120)
    remaining = iter(range(requests))
    outcomes: list[Outcome] = []
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        start = time.perf_counter()

        async def client() -> None:
            for number in remaining:
                mine = body | {"prompt": f"{number}. {body['prompt']}"}
                outcomes.append(await complete(session, url, mine, start))

        await asyncio.gather(*(client() for _ in range(concurrency)))
        return outcomes, time.perf_counter() - start


def percentiles(seconds: list[float]) -> dict[str, float]:
    """p50, p95 and p99 in milliseconds."""
    if not seconds:
        return {}
    values = np.percentile(np.array(seconds) * 1e3, [50, 95, 99])
    return dict(zip(("p50", "p95", "p99"), (round(float(v), 2) for v in values), strict=True))


def summarise(outcomes: list[Outcome], wall_s: float, concurrency: int) -> dict[str, Any]:
    """What one level of concurrency gave."""
    good = [outcome for outcome in outcomes if outcome.error is None and outcome.arrivals]
    gaps = [
        later - earlier
        for outcome in good
        for earlier, later in zip(outcome.arrivals, outcome.arrivals[1:], strict=False)
    ]
    return {
        "concurrency": concurrency,
        "requests": len(outcomes),
        "errors": len(outcomes) - len(good),
        "wall_s": round(wall_s, 3),
        "tokens_per_s": round(sum(outcome.num_tokens for outcome in good) / wall_s, 1),
        "counted_by": sorted({outcome.counted_by for outcome in good}),
        "ttft_ms": percentiles([outcome.arrivals[0] - outcome.sent for outcome in good]),
        "inter_token_ms": percentiles(gaps),
        "end_to_end_ms": percentiles([outcome.arrivals[-1] - outcome.sent for outcome in good]),
    }


async def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Warms up once, then measures each level of concurrency in turn."""
    body = {
        "model": options.model,
        "prompt": PROMPT * options.prompt_repeats,
        "max_tokens": options.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    await closed_loop(options.url, body, 2, 4)
    levels = []
    print(f"{'conc':>5} {'tok/s':>9} {'ttft p50':>9} {'p99':>8} {'gap p50':>8} {'p99':>8} errors")
    for concurrency in options.concurrency:
        requests = max(options.requests, 2 * concurrency)
        outcomes, wall_s = await closed_loop(options.url, body, concurrency, requests)
        level = summarise(outcomes, wall_s, concurrency)
        levels.append(level)
        ttft, gap = level["ttft_ms"], level["inter_token_ms"]
        print(
            f"{concurrency:>5} {level['tokens_per_s']:>9} {ttft.get('p50', '-'):>9} "
            f"{ttft.get('p99', '-'):>8} {gap.get('p50', '-'):>8} {gap.get('p99', '-'):>8} "
            f"{level['errors']}"
        )
    return levels


def main() -> int:
    """The command; exit code 1 when any request failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--requests", type=int, default=32, help="at each concurrency")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--prompt-repeats", type=int, default=1)
    parser.add_argument("--save", type=Path, help="also write the JSON document to this file")
    options = parser.parse_args()
    levels = asyncio.run(measure(options))
    document = {
        "benchmark": "serve",
        **describe(),
        "model": options.model,
        "max_tokens": options.max_tokens,
        "levels": levels,
    }
    text = json.dumps(document)
    if options.save:
        options.save.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 1 if any(level["errors"] for level in levels) else 0


if __name__ == "__main__":
    sys.exit(main())
