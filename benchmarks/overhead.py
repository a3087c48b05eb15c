"""Serving overhead: what a streamed token costs when the model costs nothing.

    python -m benchmarks.overhead --save benchmarks/results/overhead-cpu.json

Runs the deployment with a null model (`null_server`) that takes 5 ms a step. `http` goes through
Ray Serve, as clients do: tokens per second as a share of what the steps allow (streams / 5 ms),
and processor time per token of the replica, of the proxy and of the rest of Ray, with Serve's own
proxy and in its HAProxy mode. `alone` is one process without Ray, part by part. The load generator
runs on the same cores and is counted apart.
"""

import asyncio
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.cpu_time import seconds_by_part
from benchmarks.latency import summarize
from benchmarks.load import Outcome, closed_loop
from benchmarks.null_server import STEP_S
from benchmarks.report import new_parser, publish
from benchmarks.server_in_process import MAX_NUM_SEQS, ServerInProcess, completion
from serve_app.machine.ports import free_port
from tools.server_process import serving

ROOT = Path(__file__).parents[1]
STREAMS = (1, 16, 32)
MODES: dict[str, dict[str, str]] = {
    "proxy": {},
    "haproxy": {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    },
}
"""Serve's ways to the replica: name, and the environment that selects it. With Serve's draining
period, a server that ends would keep its replica for half a minute."""


def alone(num_tokens: int, rounds: int) -> dict[str, Any]:
    """Returns the microseconds of processor time per token, up to each part of the path."""
    bench = ServerInProcess(num_tokens)
    found: dict[str, Any] = {}
    for streams in STREAMS:
        costs: dict[str, float] = {}
        for part in bench.parts:
            runs = [bench.cost(part, streams) for _ in range(rounds)]
            costs[part] = round(statistics.median(run[0] for run in runs), 1)
            costs.setdefault("engine's thread", round(statistics.median(r[1] for r in runs), 1))
        found[str(streams)] = costs
        print(f"alone, {streams:>2} streams: {costs} us a token", flush=True)
    bench.server.close()
    return found


def config(port: int) -> dict[str, Any]:
    """Returns `configs/tiny.yaml` with the null model, as `serve run` takes it."""
    text = (ROOT / "configs" / "tiny.yaml").read_text(encoding="utf-8")
    document: dict[str, Any] = yaml.safe_load(text)
    document["http_options"]["port"] = port
    application = document["applications"][0]
    application["import_path"] = "benchmarks.null_server:build_app"
    application["args"]["engine"]["max_num_seqs"] = MAX_NUM_SEQS
    return document


def level(url: str, streams: int, num_tokens: int, seconds: float) -> dict[str, Any]:
    """Measures one level of load on a running server, with the processor time that it took."""
    requests = streams * max(2, round(seconds / (num_tokens * STEP_S)))

    def load(requests: int) -> tuple[list[Outcome], float]:
        return asyncio.run(closed_loop(url, lambda _: completion(num_tokens), streams, requests))

    load(streams)  # warms up
    before, own = seconds_by_part(os.getpid()), time.process_time()
    outcomes, wall_s = load(requests)
    took = {part: now - before[part] for part, now in seconds_by_part(os.getpid()).items()}
    took["load generator"] = time.process_time() - own
    found = summarize(outcomes, wall_s)
    sent = sum(outcome.num_tokens for outcome in outcomes)
    costs = {part: round(each / sent * 1e6, 1) for part, each in took.items()}
    return {
        "streams": streams,
        "share_of_ideal": round(found["tokens_per_s"] * STEP_S / streams, 4),
        "tokens_per_chunk": round(sent / sum(len(o.arrivals) for o in outcomes), 2),
        "us_per_token": costs,
        **{name: found[name] for name in ("tokens_per_s", "errors", "ttft_ms", "inter_token_ms")},
    }


def http(mode: str, num_tokens: int, seconds: float, folder: Path) -> list[dict[str, Any]]:
    """Measures every level of load in one of `MODES`."""
    port = free_port()
    path, url = folder / f"{mode}.yaml", f"http://127.0.0.1:{port}"
    path.write_text(yaml.safe_dump(config(port)), encoding="utf-8")
    command = ["-c", "from ray.serve.scripts import cli; cli()", "run", "--address", "local"]
    command = [sys.executable, *command, "--app-dir", str(ROOT), str(path)]
    levels = []
    with serving(command, MODES[mode], url, completion(8), folder / f"{mode}.log"):
        for streams in STREAMS:
            found = level(url, streams, num_tokens, seconds)
            levels.append(found)
            print(
                f"{mode}, {streams:>2} streams: {found['share_of_ideal']:.1%} of the ideal, "
                f"{found['tokens_per_chunk']} tokens a chunk, {found['us_per_token']} us a token, "
                f"{found['errors']} errors",
                flush=True,
            )
    return levels


def main() -> int:
    """Returns the command; exit code 1 when any request failed."""
    parser = new_parser(__doc__)
    parser.add_argument("--modes", nargs="*", choices=MODES, default=list(MODES))
    parser.add_argument("--tokens", type=int, default=400, help="of each answer")
    parser.add_argument("--seconds", type=float, default=8, help="of each level over HTTP")
    parser.add_argument("--rounds", type=int, default=3, help="in one process; 0 for none")
    options = parser.parse_args()
    figures: dict[str, Any] = {"step_ms": STEP_S * 1e3, "load_average": os.getloadavg()[0]}
    if options.rounds:
        figures["alone_us_per_token"] = alone(options.tokens, options.rounds)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        figures["http"] = {
            mode: http(mode, options.tokens, options.seconds, Path(folder))
            for mode in options.modes
        }
    publish("overhead", figures, options.save)
    failed = [each for levels in figures["http"].values() for each in levels if each["errors"]]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
