"""Our server, vLLM on CPU, `transformers serve` and llama.cpp under the same load, in one run.

    python -m benchmarks.peers

All serve the same weights in float32 and get the same prompts: 64 tokens an answer, streamed, in a
closed loop. Each server is alone on the machine with the load generator. Our server runs with
Serve's own proxy and with HAProxy. Servers run in turn, round after round; figures are medians. The
first run makes each peer's environment from the package index. A peer that cannot take part is
named with the reason. The exit code is 1 only when our server did not run.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.comparison import OURS, OURS_DIRECT, Round, likeness, medians, ratios, targets
from benchmarks.latency import summarize
from benchmarks.load import Request, closed_loop
from benchmarks.peer_checkpoint import write_checkpoint
from benchmarks.peer_environments import PeerError, python_of, versions
from benchmarks.peer_gguf import write_gguf
from benchmarks.peer_servers import PEERS, SEQUENCES, Peer, Site, home, own_python
from benchmarks.plot import plot
from benchmarks.prompts import Lengths, Prompts
from benchmarks.report import new_parser, publish
from tools.server_process import ServerError, free_port, serving

TOKENS = 64
WORDS = 16
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
        """Makes its environment and notes its versions; raises `PeerError`."""
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
        """One round of one peer; raises `ServerError` where it does not start."""
        where = home(peer, self.options.environments)
        python = where / "bin" / "python" if where else own_python()
        cores = len(os.sched_getaffinity(0))
        site = Site(python, self.checkpoint, self.gguf, self.folder, free_port(), cores)
        url = f"http://127.0.0.1:{site.port}"
        prompts = Prompts(Lengths(WORDS, WORDS), Lengths(TOKENS, TOKENS), seed=number)

        def request(each: int) -> dict[str, Any]:
            text, tokens = prompts.draw(each)
            return {
                "model": peer.model(site),
                "prompt": text,
                "max_tokens": tokens,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
            } | peer.fields

        log = self.folder / f"{peer.name}.log"
        command, variables = peer.command(site), peer.variables(site)
        with serving(command, variables, url, request(0), log) as start_s:
            self.about[peer.name].setdefault("start_s", []).append(round(start_s, 1))
            levels = asyncio.run(self._levels(peer, url, request))
        self.rounds.setdefault(peer.name, []).append(levels)

    async def _levels(self, peer: Peer, url: str, request: Request) -> Round:
        """All levels of one server, after a warm-up at the highest one."""
        (first, *_), _ = await closed_loop(url, request, 1, 1)
        self.answers.setdefault(peer.name, first.text)
        most = max(self.options.concurrency)
        await closed_loop(url, after(request, 1), most, 2 * most)
        sent = 1 + 2 * most
        levels: Round = {}
        for concurrency in self.options.concurrency:
            count = max(self.options.requests, 4 * concurrency)
            outcomes, wall_s = await closed_loop(url, after(request, sent), concurrency, count)
            sent += count
            level = summarize(outcomes, wall_s)
            levels[concurrency] = {"concurrency": concurrency, **level}
            print(row(peer.name, levels[concurrency]), flush=True)
        return levels

    def document(self) -> dict[str, Any]:
        """All figures of the run."""
        middle = {name: medians(rounds) for name, rounds in self.rounds.items()}
        compared = {name: ratios(middle, name) for name in (OURS, OURS_DIRECT) if name in middle}
        for name, answer in self.answers.items():
            self.about[name]["same_answer"] = likeness(self.answers.get(OURS, ""), answer)
        return {
            "load": {"answer_tokens": TOKENS, "prompt_words": WORDS, "sequences": SEQUENCES},
            "notes": self.options.notes,
            "peers": self.about,
            "left_out": self.left_out,
            "rounds": {name: len(rounds) for name, rounds in self.rounds.items()},
            "medians": middle,
            "ours_to_theirs": compared,
            "targets": {name: targets(found) for name, found in compared.items()},
            "each_round": self.rounds,
        }


def after(request: Request, sent: int) -> Request:
    """The same requests without the first `sent`, so that no prompt comes twice."""
    return lambda number: request(sent + number)


HEADER = f"{'':>13} {'conc':>5} {'tok/s':>8} {'ttft p50':>9} {'p99':>8} {'gap p50':>8} errors"


def row(name: str, level: dict[str, Any]) -> str:
    """One level of one server, for people."""
    ttft, gap = level["ttft_ms"], level["inter_token_ms"]
    return (
        f"{name:>13} {level['concurrency']:>5} {level['tokens_per_s']:>8} "
        f"{ttft.get('p50', '-'):>9} {ttft.get('p99', '-'):>8} {gap.get('p50', '-'):>8} "
        f"{level['errors']}"
    )


def run_all(run: Run, peers: tuple[Peer, ...], rounds: int) -> None:
    """Runs every peer in turn, round after round; a peer that fails is left out from then on."""

    def attempt(peer: Peer, step: Callable[..., None], *given: Any) -> None:
        if peer.name in run.left_out:
            return
        try:
            step(peer, *given)
        except (PeerError, ServerError) as error:
            run.left_out[peer.name] = str(error)
            print(f"{peer.name} is left out. {error}", flush=True)

    for peer in peers:
        attempt(peer, run.prepare)
    print(HEADER)
    for number in range(rounds):
        for peer in peers:
            attempt(peer, run.measure, number)


def report(document: dict[str, Any]) -> None:
    """The medians, the ratios and the targets, for people."""
    print(f"\nMedians.\n{HEADER}")
    for name, levels in document["medians"].items():
        for level in levels.values():
            print(row(name, level))
    print("\nOurs to theirs: tokens/s (more is better), p99 of TTFT (less is better).")
    for ours, compared in document["ours_to_theirs"].items():
        for name, by_level in compared.items():
            for concurrency, ratio in by_level.items():
                speed, wait = ratio["tokens_per_s"], ratio["ttft_p99"]
                print(f"{ours:>13} to {name:>13} {concurrency:>5} {speed:>8} {wait:>8}")
        for target in document["targets"][ours]:
            print(("met   " if target["met"] else "missed"), json.dumps(target))


def main() -> int:
    """The command; exit code 1 when ours did not run."""
    parser = new_parser(__doc__)
    parser.add_argument("--environments", type=Path, default=CACHE, help="kept for the next run")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 16, 64])
    parser.add_argument("--requests", type=int, default=24, help="at each level, at least")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", nargs="+", choices=[peer.name for peer in PEERS])
    parser.add_argument("--notes", default="", help="kept in the document")
    parser.add_argument("--plot", type=Path, help="also draw the medians as SVG into this file")
    options = parser.parse_args()
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="peers-"))
    run = Run(folder, options)
    chosen = tuple(peer for peer in PEERS if not options.peers or peer.name in options.peers)
    run_all(run, chosen, options.rounds)
    document = run.document() | {"minutes": round((time.monotonic() - began) / 60, 1)}
    report(document)
    middle = document["medians"]
    if options.plot:
        series = {name: list(levels.values()) for name, levels in middle.items()}
        plot(series, "concurrency", options.plot)
    print(f"The servers' logs are in {folder}.", file=sys.stderr)
    publish("peers", document, options.save)
    return 0 if OURS in run.rounds and OURS not in run.left_out else 1


if __name__ == "__main__":
    sys.exit(main())
