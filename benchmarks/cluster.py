"""Several replicas of the tiny model on this machine: what it gives to route by conversation.

    python -m benchmarks.cluster --save benchmarks/results/cluster.json

Starts `mixtral-serve run` with 1, 2 and 4 replicas, and holds the conversations of
`benchmarks.conversations`. Three ways to choose a replica are compared:

    conversation   HAProxy as it is: by the beginning of the prompt
    request        HAProxy, with another `prompt_cache_key` for each request
    serve          Serve's own proxy and its choice, the less busy one of two replicas

`cached` is the share of the later turns' prompt tokens that came from the prefix cache, `cores` the
processors that each part took. All replicas share this machine's processors, so tokens/s do not
grow with them.
"""

import asyncio
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.conversations import TURNS, WORDS, conversation, figures
from benchmarks.load import Outcome, new_session
from benchmarks.report import Report, new_parser, say
from benchmarks.running_server import RunningServer
from tools.server_process import free_port, serving

ROOT = Path(__file__).parents[1]
REPLICAS = (1, 2, 4)
WAYS = ("conversation", "request", "serve")
REPLICA = "ray::ServeReplica:mixtral"


@dataclass
class EachRequest(RunningServer):
    """A server whose every request looks like a conversation of its own."""

    def body(self, prompt: str | list[int], max_tokens: int) -> dict[str, Any]:
        return super().body(prompt, max_tokens) | {"prompt_cache_key": uuid.uuid4().hex}


@contextmanager
def server(way: str, replicas: int, folder: Path) -> Iterator[str]:
    """`mixtral-serve run` with `replicas` of the tiny model once all of them run; its URL."""
    document = yaml.safe_load((ROOT / "configs/tiny.yaml").read_text())
    port = free_port()
    document["http_options"]["port"] = port
    # A small part of a processor each, so that Ray starts more replicas than there are processors.
    deployment = {"num_replicas": replicas, "ray_actor_options": {"num_cpus": 0.1}}
    document["applications"][0]["deployments"] = [{"name": "mixtral", **deployment}]
    config = folder / "cluster.yaml"
    config.write_text(yaml.safe_dump(document))
    command = [str(Path(sys.executable).with_name("mixtral-serve")), "run", str(config)]
    variables = {"RAY_SERVE_ENABLE_HA_PROXY": "0" if way == "serve" else "1"}
    url = f"http://127.0.0.1:{port}"
    first = {"model": "tiny", "prompt": "a", "max_tokens": 1}
    with serving(command, variables, url, first, folder / "log"):
        yield url


async def hold(server: RunningServer, count: int) -> tuple[list[list[Outcome]], float]:
    """Runs `count` concurrent conversations, whose texts are new to the server. Returns them and
    the seconds."""
    turns = [[server.words(WORDS) for _ in range(TURNS)] for _ in range(count)]
    loop = asyncio.get_running_loop()
    async with new_session() as session:
        start = loop.time()
        held = await asyncio.gather(*(conversation(session, server, each, start) for each in turns))
        return list(held), loop.time() - start


def measure(url: str, way: str, count: int) -> dict[str, Any]:
    """Returns the figures of one way; four conversations before warm the replicas up."""
    kind = EachRequest if way == "request" else RunningServer
    running = kind(url, "tiny")
    asyncio.run(hold(running, 4))
    before = cpu_seconds()
    held, wall_s = asyncio.run(hold(running, count))
    later = list(chain.from_iterable(each[1:] for each in held))
    prompts = sum(outcome.prompt_tokens or 0 for outcome in later)
    cached = sum(outcome.cached_tokens for outcome in later)
    found = figures(held, wall_s) | {"cached": round(cached / max(1, prompts), 3)}
    return found | {"cores": {name: round(s / wall_s, 2) for name, s in spent(before).items()}}


def kind_of(process: psutil.Process) -> str | None:
    """Returns the name of the server's component that a process is; None for other processes."""
    command = " ".join(process.info["cmdline"] or ())
    if command.startswith(REPLICA):
        return "replicas"
    if "haproxy.cfg" in command:
        return "haproxy"
    if command.startswith(("ray::", "ray/")) or "/ray/" in command:
        return "ray"
    return None


def cpu_seconds() -> dict[tuple[str, int], float]:
    """Processor time of each process of a server on this machine."""
    times = {}
    for process in psutil.process_iter(["cmdline", "cpu_times", "pid"]):
        if (kind := kind_of(process)) is not None:
            spent = process.info["cpu_times"]
            times[kind, process.info["pid"]] = spent.user + spent.system
    return times


def spent(before: dict[tuple[str, int], float]) -> dict[str, float]:
    """Processor seconds by part since `before`."""
    total: dict[str, float] = {}
    for (kind, pid), seconds in cpu_seconds().items():
        total[kind] = total.get(kind, 0.0) + seconds - before.get((kind, pid), 0.0)
    return total


def main() -> int:
    """Returns the command; exit code 1 when a part of the run failed."""
    parser = new_parser(__doc__)
    parser.add_argument("--conversations", type=int, default=16)
    parser.add_argument("--replicas", type=int, nargs="+", default=REPLICAS)
    options = parser.parse_args()
    load = {"conversations": options.conversations, "turns": TURNS, "words": WORDS}
    report = Report("cluster", load | {"by": {}}, options.save)
    for replicas in options.replicas:
        for way in WAYS:
            with report.part(f"{replicas} {way}"), tempfile.TemporaryDirectory() as folder:
                with server(way, replicas, Path(folder)) as url:
                    found = measure(url, way, options.conversations)
                report.figures["by"][f"{replicas} {way}"] = found
                last = found["first_token_ms"][str(TURNS)]
                say(
                    f"{replicas} replicas by {way}: {found['cached']:.0%} cached, "
                    f"{found['tokens_per_s']} tokens/s, first token of the last turn {last} ms, "
                    f"cores {found['cores']}, {found['errors']} errors"
                )
    report.publish()
    return 1 if report.figures["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
