"""A load generator for OpenAI-compatible servers: tokens per second and latencies.

    python -m benchmarks.serve --url http://127.0.0.1:8000 --concurrency 1 8 16
    python -m benchmarks.serve --rate 2 4 8 --slo-ttft-ms 200 --slo-inter-token-ms 50

Sends `/v1/completions` with `stream` and `ignore_eos`, so that every server does the same work.
Tokens are counted by the server's usage, or by chunks where a server sends none (`counted_by`).
"""

import argparse
import asyncio
import sys
from pathlib import Path
from typing import Any

from benchmarks.latency import Objective, summarize
from benchmarks.load import closed_loop, open_loop
from benchmarks.plot import plot
from benchmarks.prompts import Lengths, Prompts
from benchmarks.report import publish
from benchmarks.running_server import RunningServer, server_parser

HEADER = (
    f"{'load':>7} {'tok/s':>8} {'ttft p50':>9} {'p95':>8} {'p99':>8} {'gap p50':>8} {'p95':>7} "
    f"{'p99':>7} {'end p50':>9} {'p95':>9} {'p99':>9} {'good/s':>7} errors"
)


def row(load: float, level: dict[str, Any]) -> str:
    """Returns one level of load as a line of the table."""
    cells = [f"{load:>7g} {level['tokens_per_s']:>8}"]
    for name, widths in (
        ("ttft_ms", (9, 8, 8)),
        ("inter_token_ms", (8, 7, 7)),
        ("end_to_end_ms", (9, 9, 9)),
    ):
        for quantile, width in zip(("p50", "p95", "p99"), widths, strict=True):
            cells.append(f"{level[name].get(quantile, '-'):>{width}}")
    good = level.get("goodput", {}).get("requests_per_s", "-")
    return " ".join([*cells, f"{good:>7}", str(level["errors"])])


async def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Warms up once, then measures each level of load in turn."""
    prompts = Prompts(
        options.prompt_words, options.output_tokens, options.shared_prefix, options.seed
    )
    server, sent = RunningServer(options.url, options.model), 0

    def request(number: int) -> dict[str, Any]:
        return server.body(*prompts.draw(sent + number))

    await closed_loop(options.url, request, 2, 4)
    sent += 4
    objective = None
    if options.slo_ttft_ms is not None or options.slo_inter_token_ms is not None:
        objective = Objective(options.slo_ttft_ms, options.slo_inter_token_ms)
    levels: list[dict[str, Any]] = []
    print(HEADER)
    for load in options.rate or options.concurrency:
        if options.rate:
            requests = options.requests
            outcomes, wall_s = await open_loop(options.url, request, load, requests, options.seed)
        else:
            requests = max(options.requests, 2 * load)
            outcomes, wall_s = await closed_loop(options.url, request, load, requests)
        sent += requests  # no level meets a prompt of another one
        level = summarize(outcomes, wall_s, objective)
        levels.append({("rate" if options.rate else "concurrency"): load, **level})
        print(row(load, level), flush=True)
    return levels


def arguments() -> argparse.ArgumentParser:
    """Returns the command's options."""
    parser = server_parser(__doc__)
    load = parser.add_mutually_exclusive_group()
    load.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 16], help="closed loop")
    load.add_argument("--rate", type=float, nargs="+", help="open loop: requests a second, Poisson")
    parser.add_argument("--requests", type=int, default=32, help="at each level of load")
    forms = "N, LOW:HIGH or lognormal:MEDIAN:SIGMA"
    parser.add_argument("--prompt-words", type=Lengths.parse, default="16", help=forms)
    parser.add_argument("--output-tokens", type=Lengths.parse, default="64", help=forms)
    parser.add_argument(
        "--shared-prefix", type=float, default=0.0, help="share of each prompt that all begin with"
    )
    parser.add_argument("--slo-ttft-ms", type=float, help="goodput: first token within this")
    parser.add_argument("--slo-inter-token-ms", type=float, help="goodput: mean time per token")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="also draw the levels as SVG into this file")
    return parser


def main() -> int:
    """Returns the command; exit code 1 when any request failed."""
    options = arguments().parse_args()
    levels = asyncio.run(measure(options))
    chosen = ("output_tokens", "prompt_words")
    figures = {
        "model": options.model,
        "load": "open" if options.rate else "closed",
        **{name: vars(getattr(options, name)) for name in chosen},
        "shared_prefix": options.shared_prefix,
        "slo": {
            "ttft_ms": options.slo_ttft_ms,
            "inter_token_ms": options.slo_inter_token_ms,
        },
        "seed": options.seed,
        "levels": levels,
    }
    if options.plot:
        plot({options.model: levels}, "rate" if options.rate else "concurrency", options.plot)
    publish("serve", figures, options.save)
    return 1 if any(level["errors"] for level in levels) else 0


if __name__ == "__main__":
    sys.exit(main())
