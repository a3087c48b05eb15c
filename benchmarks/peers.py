"""Our server, vLLM on CPU, `transformers serve` and llama.cpp under the same loads, in one run.

    python -m benchmarks.peers
    python -m benchmarks.peers --loads conversations --peers "ours, HAProxy" vllm --rounds 1

All serve the same weights in float32 and get the same prompts, streamed: short ones in a closed
loop, conversations, long prompts, and a stream beside a long prompt (`peer_loads.py`).
`transformers serve` gets the short ones alone. Each server is alone on the machine with the load
generator. Our server runs in Serve's HAProxy mode and with Serve's own proxy; every figure stands
in the column of its mode. Servers run in turn, round after round; figures are medians. The first
run makes each peer's environment from the package index. A peer that cannot take part is named with
the reason. The exit code is 1 only when our server in HAProxy mode did not run.
"""

import argparse
import asyncio
import json
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.comparison import (
    OURS,
    OURS_SERVE,
    Key,
    Round,
    figures,
    likeness,
    medians,
    ratios,
    table,
    targets,
)
from benchmarks.load import closed_loop
from benchmarks.long_prompts import SIZES
from benchmarks.peer_checkpoint import write_checkpoint
from benchmarks.peer_environments import PeerError, python_of, versions
from benchmarks.peer_gguf import write_gguf
from benchmarks.peer_loads import LOADS, about, short_request
from benchmarks.peer_servers import PEERS, SEQUENCES, Peer, Site, home, own_python
from benchmarks.plot import plot
from benchmarks.report import new_parser, publish, say
from benchmarks.running_server import RunningServer
from serve_app.machine.ports import free_port
from tools.server_process import ServerError, serving

CACHE = Path.home() / ".cache" / "mixtral-serve" / "peers"


class Run:
    """One run: the figures of each peer, and the reasons of those that were left out."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder = folder
        self.options = options
        self.checkpoint = write_checkpoint(folder / "checkpoint")
        self.gguf = write_gguf(self.checkpoint, folder / "tiny.gguf")
        self.rounds: dict[str, list[Round]] = {}
        self.left_out: dict[str, str] = {}
        self.about: dict[str, dict[str, Any]] = {}
        self.answers: dict[str, str] = {}

    def prepare(self, peer: Peer) -> None:
        """Makes its environment and notes its versions. Raises `PeerError`."""
        where = home(peer, self.options.environments)
        python = own_python()
        if where:
            print(f"{peer.name}: environment {where}", flush=True)
            python = python_of(where, peer.requirements, peer.removed)
        self.about[peer.name] = {
            "versions": versions(python, peer.packages),
            "dtype": "float32",
            "how": peer.how,
        }

    def measure(self, peer: Peer, number: int) -> None:
        """Runs one round of one peer. Raises `ServerError` if it does not start."""
        where = home(peer, self.options.environments)
        python = where / "bin" / "python" if where else own_python()
        cores = len(os.sched_getaffinity(0))
        site = Site(python, self.checkpoint, self.gguf, self.folder, free_port(), cores)
        url = f"http://127.0.0.1:{site.port}"
        server = RunningServer(url, peer.model(site), peer.fields, seed=number)
        log = self.folder / f"{peer.name}.log"
        command, variables = peer.command(site), peer.variables(site)
        with serving(command, variables, url, short_request(server)(0), log) as start_s:
            self.about[peer.name].setdefault("start_s", []).append(round(start_s, 1))
            found = asyncio.run(self._loads(peer, server))
        self.rounds.setdefault(peer.name, []).append(found)

    async def _loads(self, peer: Peer, server: RunningServer) -> Round:
        """Returns all loads of one server, after a warm-up with short prompts."""
        (first, *_), _ = await closed_loop(server.url, short_request(server), 1, 1)
        self.answers.setdefault(peer.name, first.text)
        most = max(self.options.concurrency)
        await closed_loop(server.url, short_request(server), most, 2 * most)
        found: Round = {}
        for name in (name for name in self.options.loads if name in peer.loads):
            found[name] = await LOADS[name](server, self.options)
            say(*table({peer.name: figures({name: found[name]})}), sep="\n")
            say(f"errors: {sum(level['errors'] for level in found[name].values())}")
        return found

    def document(self) -> dict[str, Any]:
        """Returns all figures of the run."""
        middle = {name: medians(rounds) for name, rounds in self.rounds.items()}
        found = {name: figures(levels) for name, levels in middle.items()}
        modes = [name for name in (OURS, OURS_SERVE) if name in found]
        compared = {
            ours: {name: ratios(found[ours], found[name]) for name in found if name not in modes}
            for ours in modes
        }
        for name, answer in self.answers.items():
            self.about[name]["same_answer"] = likeness(self.answers.get(OURS, ""), answer)
        return {
            "loads": {name: about(name, self.options) for name in self.options.loads},
            "sequences": SEQUENCES,
            "notes": self.options.notes,
            "peers": self.about,
            "left_out": self.left_out,
            "rounds": {name: len(rounds) for name, rounds in self.rounds.items()},
            "medians": middle,
            "ours_to_theirs": {
                ours: {name: _named(each) for name, each in by_peer.items()}
                for ours, by_peer in compared.items()
            },
            "targets": {ours: targets(found[ours], compared[ours]) for ours in modes},
            "table": table(found),
            "each_round": self.rounds,
        }


def _named(compared: dict[Key, float]) -> dict[str, float]:
    return {str(key): value for key, value in compared.items()}


def run_all(run: Run, peers: tuple[Peer, ...], rounds: int, limit_s: float = math.inf) -> None:
    """Runs every peer in turn, round after round; a peer that fails is left out from then on.

    No round begins that would end after `limit_s` seconds if it took as long as the last one.
    """

    def attempt(peer: Peer, step: Callable[..., None], *given: Any) -> None:
        if peer.name in run.left_out:
            return
        try:
            step(peer, *given)
        except (PeerError, ServerError) as error:
            run.left_out[peer.name] = str(error)
            print(f"{peer.name} is left out. {error}", flush=True)

    began, last_s = time.monotonic(), 0.0
    for peer in peers:
        attempt(peer, run.prepare)
    for number in range(rounds):
        round_began = time.monotonic()
        if number and round_began - began + last_s > limit_s:
            print(f"{number} of {rounds} rounds fit into {limit_s:g} s.", flush=True)
            break
        for peer in peers:
            attempt(peer, run.measure, number)
        last_s = time.monotonic() - round_began


def report(document: dict[str, Any]) -> None:
    """Prints the medians and the targets."""
    print("\nMedians.", *document["table"], sep="\n")
    for ours, judged in document["targets"].items():
        print(f"\nTargets of {ours!r}; with a peer, ours divided by the peer's.")
        for target in judged:
            print("met   " if target["met"] else "missed", json.dumps(target))


def main() -> int:
    """Returns the command; exit code 1 when ours did not run."""
    parser = new_parser(__doc__)
    parser.add_argument("--environments", type=Path, default=CACHE, help="kept for the next run")
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS))
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 16, 64], help="short")
    parser.add_argument("--requests", type=int, default=24, help="short: at each level, at least")
    parser.add_argument("--conversations", type=int, default=16, help="at once")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="long prompts")
    parser.add_argument("--repeats", type=int, default=4, help="of each long prompt")
    parser.add_argument("--rounds", type=int, default=3, help="at most")
    parser.add_argument("--minutes", type=float, default=math.inf, help="for all rounds")
    parser.add_argument("--peers", nargs="+", choices=[peer.name for peer in PEERS])
    parser.add_argument("--notes", default="", help="kept in the document")
    parser.add_argument("--plot", type=Path, help="also draw the medians as SVG into this file")
    options = parser.parse_args()
    # A run that is ended early ends the server that it has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="peers-"))
    run = Run(folder, options)
    asked = options.peers or [peer.name for peer in PEERS]
    chosen = tuple(
        peer for peer in PEERS if peer.name in asked and set(peer.loads) & set(options.loads)
    )
    run_all(run, chosen, options.rounds, 60 * options.minutes)
    document = run.document() | {"minutes": round((time.monotonic() - began) / 60, 1)}
    report(document)
    if options.plot:
        levels = {name: middle["short"] for name, middle in document["medians"].items()}
        series = {name: list(cases.values()) for name, cases in levels.items()}
        plot(series, "concurrency", options.plot)
    print(f"The servers' logs are in {folder}.", file=sys.stderr)
    publish("peers", document, options.save)
    return 0 if OURS in run.rounds and OURS not in run.left_out else 1


if __name__ == "__main__":
    sys.exit(main())
