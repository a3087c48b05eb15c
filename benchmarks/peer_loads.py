"""The loads under which servers are compared, with the sizes of the command's options."""

import argparse
from collections.abc import Awaitable, Callable
from typing import Any

from benchmarks import conversations, long_prompts
from benchmarks.comparison import Level
from benchmarks.latency import summarize
from benchmarks.load import Request, closed_loop
from benchmarks.running_server import RunningServer

WORDS = 16
"""Number of words of a short prompt."""
TOKENS = 64
"""Number of tokens of its answer."""


def short_request(server: RunningServer) -> Request:
    """Makes requests with a new short prompt each."""
    return lambda _: server.body(server.words(WORDS), TOKENS)


async def short(server: RunningServer, options: argparse.Namespace) -> dict[str, Level]:
    """Sends short prompts in a closed loop at each concurrency."""
    levels = {}
    for concurrency in options.concurrency:
        count = max(options.requests, 4 * concurrency)
        outcomes, wall_s = await closed_loop(server.url, short_request(server), concurrency, count)
        level = {"concurrency": concurrency, **summarize(outcomes, wall_s)}
        levels[f"{concurrency} at once"] = level
    return levels


async def held(server: RunningServer, options: argparse.Namespace) -> dict[str, Level]:
    """Runs all conversations concurrently."""
    count = options.conversations
    return {f"{count} conversations": await conversations.measure(server, count)}


async def long(server: RunningServer, options: argparse.Namespace) -> dict[str, Level]:
    """Runs long prompts, one at a time and four concurrently."""
    return await long_prompts.measure_long(server, tuple(options.sizes), options.repeats)


async def beside(server: RunningServer, options: argparse.Namespace) -> dict[str, Level]:
    """Runs a stream while the longest prompts are computed."""
    return await long_prompts.measure_beside(server, max(options.sizes), options.repeats)


LOADS: dict[str, Callable[[RunningServer, argparse.Namespace], Awaitable[dict[str, Level]]]] = {
    "short": short,
    "conversations": held,
    "long": long,
    "beside": beside,
}


def about(load: str, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the sizes of a load, for the document."""
    sizes: dict[str, dict[str, Any]] = {
        "short": {"answer_tokens": TOKENS, "prompt_words": WORDS},
        "conversations": {
            "turns": conversations.TURNS,
            "words": conversations.WORDS,
            "answer_tokens": conversations.TOKENS,
        },
        "long": {"repeats": options.repeats, "answer_tokens": long_prompts.ANSWER},
        "beside": {"repeats": options.repeats},
    }
    return sizes[load]
