"""Long prompts: alone, four at once, and beside one stream.

    python -m benchmarks.long_prompts --url http://127.0.0.1:8000

`beside` starts a stream and then sends a long prompt. It has the stream's gaps between two
deliveries before the prompt was sent, and from then until the prompt's first token.
`benchmarks.peers` compares servers under these loads.
"""

import asyncio
import sys
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from benchmarks.latency import percentiles, summarize
from benchmarks.load import Answer, Outcome, closed_loop, new_session, read, send
from benchmarks.report import publish, say
from benchmarks.running_server import RunningServer, server_parser

SIZES = (450, 1800, 7400)
"""Tokens of the prompts, about: the generator counts words."""
TOKENS_PER_WORD = 1.73
"""Mean number of tokens per word with the tiny model's tokenizer."""
AT_ONCE = (1, 4)
ANSWER = 8
"""Tokens of an answer to a long prompt."""
STREAM = 6000
"""The most tokens of the stream, which is closed before it ends."""
SETTLED_S = 0.5
"""Seconds from the stream's first bytes to the long prompt."""


def text(server: RunningServer, num_tokens: int) -> str:
    """Returns a prompt of about `num_tokens` tokens."""
    return server.words(round(num_tokens / TOKENS_PER_WORD))


async def together(
    server: RunningServer, num_tokens: int, at_once: int, repeats: int
) -> dict[str, Any]:
    """Sends `at_once` prompts of `num_tokens` tokens together, `repeats` times."""
    outcomes, wall_s = list[Outcome](), 0.0
    for _ in range(repeats):
        prompts = [server.body(text(server, num_tokens), ANSWER) for _ in range(at_once)]
        more, seconds = await closed_loop(server.url, prompts.__getitem__, at_once, at_once)
        outcomes += more
        wall_s += seconds
    computed = sum(outcome.prompt_tokens or 0 for outcome in outcomes)
    speed = {"prompt_tokens_per_s": round(computed / wall_s, 1)} if computed else {}
    return summarize(outcomes, wall_s) | speed


@dataclass
class Beside:
    """The measurements of one stream and one long prompt. Times in seconds."""

    before: list[float] = field(default_factory=list)
    """The stream's gaps before the prompt was sent."""
    during: list[float] = field(default_factory=list)
    """The stream's gaps from then until the prompt's first token."""
    first_token_s: float | None = None
    error: str | None = None


def beside_of(stream: Outcome, prompt: Outcome) -> Beside:
    """Sorts the stream's gaps by the prompt's times.

    A gap that has begun when the prompt is sent, or has not ended at the prompt's first token, is
    counted as `during`.
    """
    if prompt.error or not prompt.arrivals:
        return Beside(error=prompt.error or "no text")
    if stream.error != "unfinished":
        return Beside(error=stream.error or "the stream ended before the prompt's first token")
    if not stream.arrivals or stream.arrivals[0] > prompt.sent:
        return Beside(error="the stream began after the prompt")
    found = Beside(first_token_s=prompt.arrivals[0] - prompt.sent)
    for began, ended in pairwise(stream.arrivals):
        if ended <= prompt.sent:
            found.before.append(ended - began)
        elif began < prompt.arrivals[0]:
            found.during.append(ended - began)
    return found


async def one_beside(server: RunningServer, num_tokens: int) -> Beside:
    """Starts a stream, sends a prompt of `num_tokens` tokens, and closes the stream."""
    stream = Answer(0.0)
    async with new_session() as session:
        start = time.perf_counter()
        body = server.body(server.words(16), STREAM)
        task = asyncio.create_task(send(session, server.url, body, start, stream))
        begun = asyncio.create_task(stream.has_begun.wait())
        try:
            await asyncio.wait([task, begun], return_when=asyncio.FIRST_COMPLETED)
            await asyncio.sleep(SETTLED_S)
            body = server.body(text(server, num_tokens), ANSWER)
            prompt = await send(session, server.url, body, start)
        finally:
            task.cancel()
            begun.cancel()
            await asyncio.gather(task, begun, return_exceptions=True)
    return beside_of(read(stream), read(prompt))


def beside_figures(runs: list[Beside]) -> dict[str, Any]:
    """Returns the figures of all runs together, in milliseconds."""
    errors = [run.error for run in runs if run.error is not None]
    during = [gap for run in runs for gap in run.during]
    found: dict[str, Any] = {
        "ttft_ms": percentiles([run.first_token_s for run in runs if run.first_token_s]),
        "gap_before_ms": percentiles([gap for run in runs for gap in run.before]),
        "gap_during_ms": percentiles(during),
        "errors": len(errors),
    }
    if during:
        found["longest_gap_ms"] = round(max(during) * 1e3, 2)
    if errors:
        found["error_kinds"] = sorted(set(errors))
    return found


async def measure_long(
    server: RunningServer, sizes: tuple[int, ...], repeats: int
) -> dict[str, dict[str, Any]]:
    """Measures every size, alone and four concurrently, after one prompt of the largest size to
    warm up."""
    await together(server, max(sizes), 1, 1)
    return {
        f"{size:,} tokens, {at_once} at once": await together(server, size, at_once, repeats)
        for size in sizes
        for at_once in AT_ONCE
    }


async def measure_beside(
    server: RunningServer, size: int, repeats: int
) -> dict[str, dict[str, Any]]:
    """Measures `repeats` prompts of `size` tokens, each with its own stream, after one to warm
    up."""
    await one_beside(server, size)
    runs = [await one_beside(server, size) for _ in range(repeats)]
    return {f"a stream beside {size:,} tokens": beside_figures(runs)}


def main() -> int:
    """Returns the command; exit code 1 when any request failed."""
    parser = server_parser(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="in tokens")
    parser.add_argument("--repeats", type=int, default=4)
    options = parser.parse_args()
    server, sizes = RunningServer(options.url, options.model), tuple(options.sizes)

    async def measure() -> dict[str, dict[str, Any]]:
        found = await measure_long(server, sizes, options.repeats)
        return found | await measure_beside(server, max(sizes), options.repeats)

    cases = asyncio.run(measure())
    for name, figures in cases.items():
        say(f"{name}: {figures}")
    publish("long_prompts", {"cases": cases}, options.save)
    return 1 if any(figures["errors"] for figures in cases.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
