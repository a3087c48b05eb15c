"""Clients that send one request after another, and what became of each request.

    python -m benchmarks.cluster_clients PORT KEY CLIENTS

sends requests until it is killed: a load generator in a process of its own.
"""

import asyncio
import sys
import threading
import time
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import uvloop

from benchmarks.http_client import Connection, Response

ROUTE = "/v1/completions"
WHOLE = "whole"
PAUSE_S = 0.02
"""Seconds that a client waits after a failure."""


class Sent(NamedTuple):
    """One request. Times are those of `time.monotonic`."""

    began: float
    ended: float
    result: str
    """`WHOLE`, the status, the name of the connection's error, or "cut" for half a stream."""


class Clients:
    """Clients in a thread of their own, from the beginning of the block to its end."""

    def __init__(
        self,
        port: int,
        num_clients: int,
        num_tokens: int,
        keys: tuple[str, ...] = ("",),
        *,
        stream: bool = True,
        keeps: bool = True,
    ) -> None:
        """Client n has the key n % len(keys). `keeps` leaves connections open between requests."""
        self.sent: list[Sent] = []
        self._port, self._num_clients, self._num_tokens = port, num_clients, num_tokens
        self._keys = keys
        self._stream, self._keeps = stream, keeps
        self._is_over = False
        self._number = 0
        self._thread = threading.Thread(target=lambda: uvloop.run(self._run()))

    def __enter__(self) -> "Clients":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        self._thread.join()

    async def _run(self) -> None:
        await asyncio.gather(*(self._client(number) for number in range(self._num_clients)))

    async def _client(self, number: int) -> None:
        key = self._keys[number % len(self._keys)]
        connection = Connection("127.0.0.1", self._port, key or None)
        while not self._is_over:
            began, pause_s = time.monotonic(), PAUSE_S
            try:
                response = await connection.request("POST", ROUTE, self._body())
                result = _result(response)
                pause_s = float(response.headers.get(b"retry-after", PAUSE_S))
            except (OSError, EOFError, asyncio.IncompleteReadError) as error:
                result = type(error).__name__
            self.sent.append(Sent(began, time.monotonic(), result))
            if not self._keeps:
                connection.close()
            if result != WHOLE:
                await asyncio.sleep(pause_s)
        connection.close()

    def _body(self) -> dict[str, Any]:
        """Returns a request with a unique beginning, so that it may go to any replica."""
        self._number += 1
        return {
            "prompt": f"{self._number}. What is {self._number} + 1?",
            "max_tokens": self._num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": self._stream,
        }

    def between(self, begin: float, end: float) -> dict[str, Any]:
        """Returns tokens/s, milliseconds per answer and failures of what ended between two times.

        The times are those of `time.monotonic`.
        """
        within = [each for each in self.sent if begin <= each.ended <= end]
        whole = [each.ended - each.began for each in within if each.result == WHOLE]
        p50, p99 = np.percentile(whole, [50, 99]) * 1000 if whole else (0.0, 0.0)
        return {
            "tokens_per_s": round(len(whole) * self._num_tokens / (end - begin), 1),
            "requests_per_s": round(len(whole) / (end - begin), 1),
            "answer_ms": {"p50": round(float(p50), 1), "p99": round(float(p99), 1)},
            "failed": failures(within),
        }


def _result(response: Response) -> str:
    if response.status != 200:
        return str(response.status)
    is_stream = response.headers.get(b"content-type", b"").startswith(b"text/event-stream")
    return "cut" if is_stream and not response.body.endswith(b"data: [DONE]\n\n") else WHOLE


def failures(sent: list[Sent]) -> dict[str, int]:
    """Returns the number of failed requests by their `Sent.result`."""
    return dict(Counter(each.result for each in sent if each.result != WHOLE))


if __name__ == "__main__":
    port, key, clients = sys.argv[1:]
    with Clients(int(port), int(clients), 32, (key,)):
        threading.Event().wait()
