"""A server under too many clients and under attack: what polite clients get, and how fast.

    python -m benchmarks.overload                       # about 5 minutes for each proxy
    python -m benchmarks.overload --proxies haproxy --soak-s 600

Starts `mixtral-serve run tiny` with its defaults and an API key. Useful tokens/s, answers,
refusals, `/ping`, memory and event-loop lag with 0.5 to 8 times as many clients as the engine's
queue takes (closed loop: each sends its next request at once), and with 0.5 to 8 times as many new
requests a second as it answers (open loop). Clients wait as long as `Retry-After` says. Then each
attack beside ten polite clients, and SIGTERM while 600 clients wait.

The load generator's processes share the machine with the server; its own processor time is in the
figures as `generator_cores`, how late its event loop runs, which is in each of its latencies, as
`generator_lag_ms`, and how late an idle process wakes up meanwhile as `idle_loop`.
"""

import asyncio
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.attacks import ATTACKS
from benchmarks.http_client import Connection
from benchmarks.overloaded_server import Server, attacking, lag_p99_ms, probing
from benchmarks.polite_clients import KEY, ROUTE, WARM_S, PoliteClients, Seen, completion
from benchmarks.report import Report, new_parser, say

FACTORS = (0.5, 1, 2, 4, 8)
NUM_TOKENS = 32
NUM_POLITE = 10
NUM_WAITING = 600
MAX_MEMORY_RATIO = 1.1
"""Memory of the replica after a soak, to that after its first minute."""
MAX_LAG_MS = 50.0
"""Largest lag of the event loop in a soak, 99th percentile."""


class Overload:
    """The parts of one run against one server."""

    def __init__(self, server: Server, seconds: float) -> None:
        self._server = server
        self._seconds = seconds

    def measured(self, clients: PoliteClients, loop: Any) -> dict[str, Any]:
        """Runs `loop`, a coroutine of `clients`, and the probe at the same time."""
        before, cpu = self._server.lag_buckets(), time.process_time()
        with probing(self._server.port) as probed:
            seen: Seen = uvloop.run(loop)
        cores = (time.process_time() - cpu) / self._seconds
        return {
            **seen.figures(WARM_S, self._seconds),
            "probe": probed,
            "loop_lag_p99_ms": lag_p99_ms(before, self._server.lag_buckets()),
            "replica_mb": round(self._server.replica_bytes() / 1e6),
            "generator_cores": round(cores, 2),
        }

    def clients(self) -> PoliteClients:
        return PoliteClients(self._server.port, NUM_TOKENS)

    def closed(self, num_clients: int) -> dict[str, Any]:
        clients = self.clients()
        return self.measured(clients, clients.closed_loop(num_clients, self._seconds))

    def open(self, rate: float) -> dict[str, Any]:
        clients = self.clients()
        return self.measured(clients, clients.open_loop(rate, self._seconds))

    def attack(self, names: list[str]) -> dict[str, Any]:
        """Runs ten polite clients alone, then together with the attacks."""
        alone = self.closed(NUM_POLITE)
        with attacking(names, self._server.port):
            time.sleep(1)
            beside = self.closed(NUM_POLITE)
        ratio = None
        if alone["answer_ms"] and beside["answer_ms"]:
            ratio = round(beside["answer_ms"]["p99"] / alone["answer_ms"]["p99"], 2)
        return {"alone": alone, "beside": beside, "p99_ratio": ratio}

    def sigterm(self) -> dict[str, Any]:
        """Ends the server while 600 clients wait: how each was answered, and the exit code."""

        async def run() -> Counter[str]:
            body = completion(0, 256)
            asked = [asyncio.create_task(self._ask(body)) for _ in range(NUM_WAITING)]
            await asyncio.sleep(1.0)
            self._server.process.terminate()
            return Counter(await asyncio.gather(*asked))

        answered = asyncio.run(run())
        return {"answers": dict(answered), "exit_code": self._server.process.wait(90)}

    async def _ask(self, body: Any) -> str:
        connection = Connection("127.0.0.1", self._server.port, KEY)
        try:
            return str((await connection.request("POST", ROUTE, body)).status)
        except (OSError, EOFError) as error:
            return type(error).__name__
        finally:
            connection.close()


def run(report: Report, proxy: str, options: Any) -> None:
    """Runs all parts with one proxy. If a part fails, that is recorded and the others run."""
    figures: dict[str, Any] = {}
    report.figures[proxy] = figures
    log = Path(tempfile.mkdtemp()) / "server.log"
    server = Server(proxy, log)
    overload = Overload(server, options.seconds)
    try:
        capacity = server.max_clients()
        points: dict[str, Any] = {"closed": {}, "open": {}}
        figures |= {"capacity_clients": capacity, **points, "attacks": {}}
        rate = 0.0
        for factor in FACTORS:
            with report.part(f"{proxy} closed {factor}"):
                point = overload.closed(int(capacity * factor))
                points["closed"][str(factor)] = point
                rate = max(rate, point["tokens_per_s"] / NUM_TOKENS)
                say(proxy, "closed", factor, line(point))
        for factor in FACTORS:
            with report.part(f"{proxy} open {factor}"):
                points["open"][str(factor)] = overload.open(rate * factor)
                say(proxy, "open", factor, line(points["open"][str(factor)]))
        for name in options.attacks:
            with report.part(f"{proxy} {name}"):
                figures["attacks"][name] = overload.attack([name])
                say(proxy, name, figures["attacks"][name]["p99_ratio"])
        if options.soak_s:
            with report.part(f"{proxy} soak"):
                figures["soak"] = soak(server, options.soak_s)
                say(proxy, "soak", figures["soak"])
        with report.part(f"{proxy} sigterm"):
            figures["sigterm"] = overload.sigterm()
            say(proxy, "sigterm", figures["sigterm"])
        figures["errors_in_log"] = server.errors_in_log()
    finally:
        server.kill()


def soak(server: Server, seconds: float) -> dict[str, Any]:
    """Runs all attacks and twice as many clients as the queue allows at the same time."""
    num_clients = 2 * server.max_clients()
    with attacking(list(ATTACKS), server.port):
        first = Overload(server, min(60.0, seconds / 4)).closed(num_clients)
        before = server.replica_bytes()
        whole = Overload(server, seconds).closed(num_clients)
    time.sleep(5)
    ratio = round(server.replica_bytes() / before, 3)
    return {"first": first, "whole": whole, "memory_ratio": ratio, "missed": missed(whole, ratio)}


def missed(whole: dict[str, Any], memory_ratio: float) -> list[str]:
    """Returns the targets of a soak that its figures miss."""
    others = whole["others"] | whole["probe"]["wrong"]
    found = [f"{count} requests ended with {what}" for what, count in others.items()]
    if memory_ratio > MAX_MEMORY_RATIO:
        found.append(f"the replica's memory grew {memory_ratio} times")
    if (lag := whole["loop_lag_p99_ms"]) is None or lag > MAX_LAG_MS:
        found.append(f"the event loop's lag is {lag} ms at the 99th percentile")
    return found


def line(point: dict[str, Any]) -> str:
    return (
        f"{point['tokens_per_s']} tokens/s, answers {point['answer_ms']} ms, {point['refusals']} "
        f"refusals {point['refusal_ms']} ms, probe {point['probe']}, others {point['others']}, "
        f"lag {point['loop_lag_p99_ms']}, {point['replica_mb']} MB, generator "
        f"{point['generator_cores']} cores, lag {point['generator_lag_ms']}"
    )


def main() -> int:
    """Returns the command."""
    parser = new_parser(__doc__)
    parser.add_argument("--proxies", nargs="+", default=["haproxy"], choices=["haproxy", "serve"])
    parser.add_argument("--seconds", type=float, default=10.0, help="of each point")
    parser.add_argument("--attacks", nargs="*", default=list(ATTACKS), choices=list(ATTACKS))
    parser.add_argument("--soak-s", type=float, default=0.0, help="seconds of all at once; 0: none")
    options = parser.parse_args()
    report = Report("overload", {"num_tokens": NUM_TOKENS}, options.save)
    for proxy in options.proxies:
        with report.attempt(proxy):
            run(report, proxy, options)
    report.publish()
    return 1 if report.figures["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
