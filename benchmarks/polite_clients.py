"""Clients that obey `Retry-After` of a 429: their tokens per second and latencies."""

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.http_client import Connection
from benchmarks.load import arrival_times

KEY = "overload-key"
ROUTE = "/v1/completions"
MAX_CONNECTIONS = 4000
WARM_S = 2.0
"""Seconds at the beginning of a run, in which the clients begin; they are not in its tokens/s."""


@dataclass
class Seen:
    """The results of the clients in one run."""

    answers: list[tuple[float, float, int]] = field(default_factory=list)
    """For each answer: its end since the run began and its duration, in seconds, and its tokens."""
    refusals: list[float] = field(default_factory=list)
    """Seconds that each 429 took."""
    retry_after: list[int] = field(default_factory=list)
    lags: list[float] = field(default_factory=list)
    """Seconds by which this process's event loop was late, a hundred times a second."""
    others: dict[str, int] = field(default_factory=dict)
    """Counts of other statuses and errors."""

    def other(self, what: str) -> None:
        self.others[what] = self.others.get(what, 0) + 1

    def figures(self, begin_s: float, end_s: float) -> dict[str, Any]:
        """Returns the tokens a second and latencies in ms of what ended between two times."""
        within = [each for each in self.answers if begin_s <= each[0] <= end_s]
        return {
            "tokens_per_s": round(sum(each[2] for each in within) / (end_s - begin_s), 1),
            "answers": len(within),
            "answer_ms": percentiles([each[1] for each in within]),
            "refusals": len(self.refusals),
            "refusal_ms": percentiles(self.refusals),
            "retry_after_s": [min(self.retry_after), max(self.retry_after)]
            if self.retry_after
            else None,
            "generator_lag_ms": percentiles(self.lags),
            "others": self.others,
        }


def percentiles(seconds: list[float]) -> dict[str, float] | None:
    """Returns p50 and p99 in ms."""
    if not seconds:
        return None
    p50, p99 = np.percentile(seconds, [50, 99])
    return {"p50": round(float(p50) * 1000, 1), "p99": round(float(p99) * 1000, 1)}


class PoliteClients:
    """Sends completions of `num_tokens` tokens to one server."""

    def __init__(self, port: int, num_tokens: int) -> None:
        self._port = port
        self._num_tokens = num_tokens
        self._number = 0
        self._began = 0.0
        self.seen = Seen()

    async def closed_loop(self, num_clients: int, seconds: float) -> Seen:
        """Runs clients that send their next request when their last one has ended."""
        self._began = time.perf_counter()
        await self._for(seconds, [self._client() for _ in range(num_clients)])
        return self.seen

    async def open_loop(self, rate: float, seconds: float, seed: int = 0) -> Seen:
        """Starts `rate` new clients per second with one request each, at any load."""
        self._began = time.perf_counter()
        dues = arrival_times(rate, int(rate * seconds), seed)
        places = asyncio.Semaphore(MAX_CONNECTIONS)

        async def one(due: float) -> None:
            await asyncio.sleep(due)
            async with places:
                await self._until_answered(self._connection())

        await self._for(seconds, [one(due) for due in dues])
        return self.seen

    async def _for(self, seconds: float, clients: list[Any]) -> None:
        tasks = [asyncio.create_task(client) for client in (*clients, self._lag())]
        await asyncio.sleep(seconds)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _lag(self) -> None:
        while True:
            due = time.perf_counter() + 0.01
            await asyncio.sleep(0.01)
            self.seen.lags.append(time.perf_counter() - due)

    def _connection(self) -> Connection:
        return Connection("127.0.0.1", self._port, KEY)

    async def _client(self) -> None:
        connection = self._connection()
        # Thousands of clients do not begin in the same millisecond.
        await asyncio.sleep(WARM_S * random.random())
        while True:
            await self._until_answered(connection, keeps=True)

    async def _until_answered(self, connection: Connection, *, keeps: bool = False) -> None:
        """Repeats one request as its refusals tell."""
        self._number += 1
        body = completion(self._number, self._num_tokens)
        try:
            wait_s = await self._try(connection, body)
            while wait_s > 0:
                await asyncio.sleep(wait_s)
                wait_s = await self._try(connection, body)
        finally:
            if not keeps:
                connection.close()

    async def _try(self, connection: Connection, body: Any) -> float:
        """Returns one try; the seconds until the next one, or 0 when the request is over."""
        sent = time.perf_counter()
        try:
            response = await connection.request("POST", ROUTE, body)
        except (OSError, EOFError) as error:
            self.seen.other(type(error).__name__)
            return 0.0
        now = time.perf_counter()
        if response.status == 200:
            tokens = json.loads(response.body)["usage"]["completion_tokens"]
            self.seen.answers.append((now - self._began, now - sent, tokens))
        elif response.status == 429:
            wait_s = int(response.headers.get(b"retry-after", b"1"))
            self.seen.refusals.append(now - sent)
            self.seen.retry_after.append(wait_s)
            return float(wait_s)
        else:
            self.seen.other(str(response.status))
        return 0.0


def completion(number: int, num_tokens: int) -> dict[str, Any]:
    """Returns the body of a request; no two prompts begin alike."""
    return {
        "prompt": f"{number}. What is {number} + 1?",
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
