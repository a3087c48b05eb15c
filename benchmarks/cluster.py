"""Several replicas on this machine: how they scale, who answers whom, and what a fault costs.

    python -m benchmarks.cluster --save benchmarks/results/cluster.json     # about 7 minutes

    scaling    tokens/s of 1, 2 and 4 replicas of the null model, whose steps take 5 ms of a device
               that is not there, and of the tiny one; which processes took the processors; and
               microseconds of HAProxy for a request with one replica and with several
    handle     microseconds of a call through a deployment handle, by router
    routing    four replicas of the tiny model and the conversations of `benchmarks.conversations`:
               prefix hits, time to the first token, tokens/s and each replica's load, by router
    fairness   one replica of either model and ten clients with a key each, alone and beside a key
               with 500 requests at once, which come from a process of their own. A step of the null
               model takes as long with 32 requests as with ten, as on a GPU; a step of the tiny one
               takes three times as long on a processor
    faults     a cluster of three nodes that loses a replica, HAProxy and a node under load: seconds
               to recover, requests lost and finished; and seconds from one replica to two

`routing` compares

    conversation   HAProxy as it is: by the beginning of the prompt
    request        HAProxy, with another `prompt_cache_key` for each request
    serve          Serve's own proxy and its choice, the less busy one of two replicas

`cached` is the share of the later turns' prompt tokens that came from the prefix cache, `cores` the
processors that each part took; `other` is the rest of Ray. All replicas and the clients share this
machine's processors.
"""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks import cluster_faults
from benchmarks.cluster_clients import Clients
from benchmarks.cluster_server import ROOT, loads, server, tokens_by_replica
from benchmarks.conversations import TURNS, WORDS, conversation, figures
from benchmarks.cpu_time import seconds_by_part
from benchmarks.load import Outcome, new_session
from benchmarks.null_server import STEP_S
from benchmarks.report import Report, new_parser, say
from benchmarks.running_server import RunningServer
from tests.cluster.plain_ray import cluster

REPLICAS = (1, 2, 4)
WAYS = ("conversation", "request", "serve")
STREAMS = 32
"""For each replica: as many as its engine runs at once."""
TOKENS = 64
CONVERSATIONS = 32
WARM_S = 2.0
SECONDS = 6.0
POLITE = tuple(f"polite-key-{number:06}" for number in range(10))
GREEDY = "greedy-key-000000"
NUM_GREEDY = 500


@dataclass
class EachRequest(RunningServer):
    """A server whose every request looks like a conversation of its own."""

    def body(self, prompt: str | list[int], max_tokens: int) -> dict[str, Any]:
        return super().body(prompt, max_tokens) | {"prompt_cache_key": uuid.uuid4().hex}


@contextmanager
def started(
    model: str, replicas: int, *, haproxy: bool = True, keys: tuple[str, ...] = ()
) -> Iterator[int]:
    """Yields the port of `server`, with files in a folder of its own."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        with server(model, replicas, Path(folder), haproxy=haproxy, keys=keys) as port:
            yield port


def under_load(clients: Clients, seconds: float = SECONDS) -> dict[str, Any]:
    """Returns the numbers of `seconds` of load after a warm-up, with the processors that each part
    used."""
    with clients:
        time.sleep(WARM_S)
        before, own = seconds_by_part(os.getpid()), time.process_time()
        begin = time.monotonic()
        time.sleep(seconds)
        end = time.monotonic()
        took = cores(before, end - begin)
        took["clients"] = round((time.process_time() - own) / (end - begin), 2)
        return {**clients.between(begin, end), "cores": took}


def cores(before: dict[str, float], wall_s: float) -> dict[str, float]:
    """Returns the number of processors that each part of a server has used since `before`.

    The time of a process that has ended since then, such as an idle one of Ray, is missing, so the
    number of its part is too small.
    """
    now = seconds_by_part(os.getpid())
    return {part: round(max(0.0, now[part] - before[part]) / wall_s, 2) for part in now}


def scaling() -> dict[str, Any]:
    """Measures tokens/s by model and number of replicas; for the null model also answers of one
    token."""
    found: dict[str, Any] = {}
    for model in ("null", "tiny"):
        for replicas in REPLICAS:
            name = f"{replicas} {model}"
            with started(model, replicas) as port:
                streams = STREAMS * replicas
                found[name] = under_load(Clients(port, streams, TOKENS))
                if model == "null":
                    ideal = streams / STEP_S
                    found[name]["share_of_ideal"] = round(found[name]["tokens_per_s"] / ideal, 3)
                    short = under_load(Clients(port, STREAMS, 1, stream=False), SECONDS / 2)
                    us = short["cores"]["proxy"] / short["requests_per_s"] * 1e6
                    found[name]["haproxy_us_per_request"] = round(us, 1)
            say(f"{name}: {found[name]}")
    return found


def handle() -> dict[str, Any]:
    """Returns the document of `benchmarks.handle_calls`, which starts a Ray of its own."""
    command = [sys.executable, "-m", "benchmarks.handle_calls"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    say(f"handle: {found}")
    return found


async def hold(server: RunningServer, count: int) -> tuple[list[list[Outcome]], float]:
    """Holds `count` conversations at once, each with turns new to the server; with the seconds."""
    turns = [[server.words(WORDS) for _ in range(TURNS)] for _ in range(count)]
    loop = asyncio.get_running_loop()
    async with new_session() as session:
        start = loop.time()
        held = await asyncio.gather(*(conversation(session, server, each, start) for each in turns))
        return list(held), loop.time() - start


def held_by(port: int, way: str, count: int) -> dict[str, Any]:
    """Returns the numbers of one router, after four conversations that warm the replicas up."""
    kind = EachRequest if way == "request" else RunningServer
    running = kind(f"http://127.0.0.1:{port}", "tiny", seed=WAYS.index(way))
    asyncio.run(hold(running, 4))
    before, tokens = seconds_by_part(os.getpid()), tokens_by_replica()
    held, wall_s = asyncio.run(hold(running, count))
    took = cores(before, wall_s)
    later = list(chain.from_iterable(each[1:] for each in held))
    prompts = sum(outcome.prompt_tokens or 0 for outcome in later)
    cached = sum(outcome.cached_tokens for outcome in later)
    return figures(held, wall_s) | {
        "cached": round(cached / max(1, prompts), 3),
        "loads": None if way == "serve" else loads(tokens, tokens_by_replica()),
        "cores": took,
    }


def routing() -> dict[str, Any]:
    """Measures each router with four replicas."""
    found: dict[str, Any] = {"conversations": CONVERSATIONS, "turns": TURNS, "words": WORDS}
    for haproxy, ways in ((True, WAYS[:2]), (False, WAYS[2:])):
        with started("tiny", 4, haproxy=haproxy) as port:
            for way in ways:
                found[way] = held_by(port, way, CONVERSATIONS)
                last = found[way]["first_token_ms"][str(TURNS)]
                say(
                    f"by {way}: {found[way]['cached']:.0%} cached, {found[way]['tokens_per_s']} "
                    f"tokens/s, first token of the last turn {last} ms, loads "
                    f"{found[way]['loads']}, cores {found[way]['cores']}, "
                    f"{found[way]['errors']} errors"
                )
    return found


def fairness() -> dict[str, Any]:
    """Measures the polite clients of each model, alone and beside the greedy key, and the ratio."""
    return {model: fairness_of(model) for model in ("null", "tiny")}


def fairness_of(model: str) -> dict[str, Any]:
    with started(model, 1, keys=(*POLITE, GREEDY)) as port:
        alone = under_load(Clients(port, len(POLITE), TOKENS, POLITE))
        command = [sys.executable, "-m", "benchmarks.cluster_clients"]
        command += [str(port), GREEDY, str(NUM_GREEDY)]
        with subprocess.Popen(command, cwd=ROOT) as greedy:
            time.sleep(2 * WARM_S)
            beside = under_load(Clients(port, len(POLITE), TOKENS, POLITE))
            greedy.kill()
    ratios = {
        name: round(beside["answer_ms"][name] / alone["answer_ms"][name], 2)
        for name in ("p50", "p99")
        if alone["answer_ms"][name]
    }
    say(f"fairness, {model}: {ratios}, alone {alone}, beside {beside}")
    return {"alone": alone, "beside": beside, "ratio": ratios}


def faults() -> dict[str, Any]:
    """Returns the document of `benchmarks.cluster_faults`."""
    with cluster() as it:
        return cluster_faults.measure(it)


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    each.__name__: each for each in (scaling, handle, routing, fairness, faults)
}


def main() -> int:
    """Runs the command. Returns its exit code: 1 if a part of the run failed."""
    parser = new_parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    report = Report("cluster", {}, options.save)
    for name in options.parts:
        with report.part(name):
            report.figures[name] = PARTS[name]()
    report.publish()
    return 1 if report.figures["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
