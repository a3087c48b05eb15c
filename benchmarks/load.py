"""Load on a server that speaks OpenAI's `/v1/completions` as a stream.

Closed loop: each of `concurrency` clients sends its next request when its last one has ended. Open
loop: requests arrive at random at a rate (Poisson), whether or not the server keeps up; waiting
counts from when a request was due. During a run only bytes and times are recorded and parsed
afterwards, because the generator shares the machine with the server. Each request has a connection
of its own, as from another user.
"""

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np

Request = Callable[[int], dict[str, Any]]
"""The body of request number n."""


@dataclass
class Outcome:
    """One request: times in seconds since the run began."""

    sent: float
    arrivals: list[float] = field(default_factory=list)
    """The arrival time of each chunk with text."""
    num_tokens: int = 0
    prompt_tokens: int | None = None
    cached_tokens: int = 0
    """Tokens of the prompt that the server says it had in its prefix cache."""
    counted_by: str = "usage"
    text: str = ""
    error: str | None = None


@dataclass
class Answer:
    """The raw bytes of an answer, with the time of each part."""

    due: float
    status: int = 0
    error: str | None = None
    parts: list[tuple[float, bytes]] = field(default_factory=list)
    has_begun: asyncio.Event = field(default_factory=asyncio.Event)
    """Set with the first part."""


async def closed_loop(
    url: str, request: Request, concurrency: int, requests: int
) -> tuple[list[Outcome], float]:
    """Sends `requests` requests, `concurrency` at any time. Returns outcomes and seconds."""
    remaining = iter(range(requests))
    answers: list[Answer] = []
    async with new_session() as session:
        start = time.perf_counter()

        async def client() -> None:
            for number in remaining:
                answers.append(await send(session, url, request(number), start))

        await asyncio.gather(*(client() for _ in range(concurrency)))
        wall_s = time.perf_counter() - start
    return [read(answer) for answer in answers], wall_s


async def open_loop(
    url: str, request: Request, rate: float, requests: int, seed: int = 0
) -> tuple[list[Outcome], float]:
    """Sends `requests` requests, `rate` a second on average. Returns outcomes and seconds."""
    due_times = arrival_times(rate, requests, seed)
    bodies = [request(number) for number in range(requests)]
    async with new_session() as session:
        start = time.perf_counter()

        async def at(due: float, body: dict[str, Any]) -> Answer:
            await asyncio.sleep(max(0.0, due - (time.perf_counter() - start)))
            return await send(session, url, body, start, Answer(due))

        answers = await asyncio.gather(
            *(at(due, body) for due, body in zip(due_times, bodies, strict=True))
        )
        wall_s = time.perf_counter() - start
    return [read(answer) for answer in answers], wall_s


def arrival_times(rate: float, requests: int, seed: int) -> list[float]:
    """Returns the seconds from the start at which requests are due: a Poisson process of `rate` a
    second."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, requests)
    return [float(due) for due in np.cumsum(gaps)]


def new_session() -> aiohttp.ClientSession:
    """Returns a session in which each request has a connection of its own."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(total=None, sock_read=120),
    )


async def send(
    session: aiohttp.ClientSession,
    url: str,
    body: dict[str, Any],
    start: float,
    answer: Answer | None = None,
) -> Answer:
    """Sends one request and fills `answer`, a new one that is due now if none is given.

    Times are in seconds since `start`. After a cancellation `answer` has the parts that came.
    """
    answer = answer or Answer(time.perf_counter() - start)
    try:
        async with session.post(f"{url}/v1/completions", json=body) as response:
            answer.status = response.status
            async for part in response.content.iter_any():
                answer.parts.append((time.perf_counter() - start, part))
                answer.has_begun.set()
    except aiohttp.ClientError as error:
        answer.error = type(error).__name__
    return answer


def read(answer: Answer) -> Outcome:
    """Parses an answer into tokens, times and text. A stream without finish reason is an error."""
    outcome = Outcome(sent=answer.due, error=answer.error)
    if outcome.error is None and answer.status != 200:
        outcome.error = f"status {answer.status}"
    usage: dict[str, Any] | None = None
    finished = False
    texts = []
    for when, line in _lines(answer.parts):
        if outcome.error or not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
            continue
        try:
            event = json.loads(line[5:])
        except ValueError:
            outcome.error = "unreadable"
            continue
        if "error" in event:
            said = event["error"]
            is_object = isinstance(said, dict)
            outcome.error = str(said.get("code") or said.get("message") if is_object else said)
            continue
        usage = event.get("usage") or usage
        for choice in event.get("choices", []):
            finished = finished or bool(choice.get("finish_reason"))
            if choice.get("text"):
                outcome.arrivals.append(when)
                texts.append(choice["text"])
    if outcome.error is None and not finished:
        outcome.error = "unfinished"
    outcome.text = "".join(texts)
    outcome.num_tokens = len(texts) if usage is None else usage["completion_tokens"]
    outcome.prompt_tokens = None if usage is None else usage.get("prompt_tokens")
    details = (usage or {}).get("prompt_tokens_details") or {}
    outcome.cached_tokens = details.get("cached_tokens") or 0
    outcome.counted_by = "chunks" if usage is None else "usage"
    return outcome


def _lines(parts: list[tuple[float, bytes]]) -> list[tuple[float, bytes]]:
    """Returns all complete lines, each with the time of its end."""
    lines = []
    rest = b""
    for when, part in parts:
        *whole, rest = (rest + part).split(b"\n")
        lines += [(when, line) for line in whole]
    return lines
