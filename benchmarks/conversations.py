"""Conversations whose history grows: prompts of new turns come in beside the other answers.

    python -m benchmarks.conversations --url http://127.0.0.1:8000

Each of 16 conversations sends a turn of 120 words, reads an answer of 48 tokens, and sends the next
turn at once, with all turns and answers before it. `first_token_ms` has the time to the first token
by turn: a server with a prefix cache computes only the new words. `benchmarks.peers` compares
servers under this load.
"""

import asyncio
import sys
import time
from itertools import chain
from typing import Any

import aiohttp

from benchmarks.latency import percentiles, summarize
from benchmarks.load import Outcome, new_session, read, send
from benchmarks.report import publish, say
from benchmarks.running_server import RunningServer, server_parser

TURNS = 6
WORDS = 120
"""Words that each turn adds; about 205 tokens of the tiny model."""
TOKENS = 48
"""Tokens of each answer."""


async def conversation(
    session: aiohttp.ClientSession, server: RunningServer, turns: list[str], start: float
) -> list[Outcome]:
    """Holds one conversation. Returns the outcome of each turn. Ends after a failed turn."""
    history, outcomes = "", list[Outcome]()
    for words in turns:
        history += f" {words}"
        outcome = read(await send(session, server.url, server.body(history, TOKENS), start))
        outcomes.append(outcome)
        if outcome.error:
            break
        history += outcome.text
    return outcomes


async def measure(server: RunningServer, count: int) -> dict[str, Any]:
    """Runs one conversation to warm up, then `count` concurrent ones. Returns the numbers of the
    latter."""
    first, *others = [[server.words(WORDS) for _ in range(TURNS)] for _ in range(count + 1)]
    async with new_session() as session:
        await conversation(session, server, first, time.perf_counter())
        start = time.perf_counter()
        held = await asyncio.gather(
            *(conversation(session, server, turns, start) for turns in others)
        )
        wall_s = time.perf_counter() - start
    return figures(held, wall_s)


def figures(held: list[list[Outcome]], wall_s: float) -> dict[str, Any]:
    """Returns the figures of all turns, the times to the first token of each turn in milliseconds,
    and the median of the last turn divided by that of the first. A turn that was not sent is an
    error."""
    found = summarize(list(chain.from_iterable(held)), wall_s)
    found["errors"] += sum(TURNS - len(outcomes) for outcomes in held)
    by_turn = {
        str(turn + 1): percentiles(
            [
                outcomes[turn].arrivals[0] - outcomes[turn].sent
                for outcomes in held
                if len(outcomes) > turn and outcomes[turn].arrivals
            ]
        )
        for turn in range(TURNS)
    }
    first, last = by_turn["1"], by_turn[str(TURNS)]
    if first and last:
        found["last_turn_to_first"] = round(last["p50"] / first["p50"], 2)
    return {**found, "first_token_ms": by_turn}


def main() -> int:
    """Returns the command; exit code 1 when any turn failed."""
    parser = server_parser(__doc__)
    parser.add_argument("--conversations", type=int, default=16)
    options = parser.parse_args()
    server = RunningServer(options.url, options.model)
    found = asyncio.run(measure(server, options.conversations))
    say(f"{found['tokens_per_s']} tokens/s, {found['errors']} errors")
    for turn, times in found["first_token_ms"].items():
        say(f"first token of turn {turn}: {times} ms")
    load = {"conversations": options.conversations, "turns": TURNS, "words": WORDS}
    publish("conversations", {**load, "answer_tokens": TOKENS, **found}, options.save)
    return 1 if found["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
