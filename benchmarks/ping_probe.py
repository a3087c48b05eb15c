"""Asks `/ping` and `/health` of a server ten times a second each, from a process of its own.

    python -m benchmarks.ping_probe PORT

Prints one line of JSON when its standard input is closed: latencies in ms, and beside them how late
this process's idle event loop woke up, which is what the machine's load alone costs.
"""

import asyncio
import contextlib
import json
import sys
import time
from typing import Any

from benchmarks.http_client import Connection
from benchmarks.polite_clients import percentiles

PERIOD_S = 0.1


async def probe(port: int) -> dict[str, Any]:
    """Probes until standard input is at its end."""
    seconds: dict[str, list[float]] = {"/ping": [], "/health": [], "idle_loop": []}
    wrong: dict[str, int] = {}

    async def ask(path: str) -> None:
        connection = Connection("127.0.0.1", port, None)
        while True:
            sent = time.perf_counter()
            try:
                status = str((await connection.request("GET", path)).status)
            except (OSError, EOFError) as error:
                status = type(error).__name__
            if status == "200":
                seconds[path].append(time.perf_counter() - sent)
            else:
                wrong[f"{path} {status}"] = wrong.get(f"{path} {status}", 0) + 1
            await asyncio.sleep(PERIOD_S)

    async def lag() -> None:
        while True:
            due = time.perf_counter() + 0.01
            await asyncio.sleep(0.01)
            seconds["idle_loop"].append(time.perf_counter() - due)

    tasks = [asyncio.create_task(each) for each in (ask("/ping"), ask("/health"), lag())]
    await asyncio.to_thread(sys.stdin.read)
    for task in tasks:
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.gather(*tasks, return_exceptions=True)
    return {name: percentiles(each) for name, each in seconds.items()} | {"wrong": wrong}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(probe(int(sys.argv[1])))))
