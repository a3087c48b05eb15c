"""Streamed RunPod jobs on a slow platform: time to first token, tokens per second, posts.

    python -m benchmarks.streaming

The real worker with RunPod's SDK and the tiny model, against the platform on loopback, which
acknowledges each post 0, 20 or 100 ms late. Beside it, in the same run, a worker that posts every
chunk alone, as handlers in guides do.
"""

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import new_parser, publish
from emulator.endpoint import Endpoint, endpoint
from emulator.worker import ENTRY

WORKERS = {
    "what has come": ENTRY,
    "one chunk": Path(__file__).with_name("per_chunk_worker.py"),
}
"""The content of one post, and the worker that makes such posts."""


@dataclass
class Stream:
    """One streamed job; times in seconds."""

    first_token_s: float
    total_s: float
    num_tokens: int
    num_posts: int


def ask(number: int, num_tokens: int) -> dict[str, Any]:
    """Returns a prompt of its own, so that no stream profits from the cached prefix of another."""
    return {
        "prompt": f"{number}. Count from 1 to 30.",
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }


def streams(place: Endpoint, num_streams: int, num_tokens: int, number: int) -> list[Stream]:
    """Runs `num_streams` concurrent jobs and records the time of each one's first token."""
    jobs = [place.send({**ask(number + n, num_tokens), "stream": True}) for n in range(num_streams)]
    first: dict[str, float] = {}

    def are_over() -> bool:
        for job in jobs:
            if job.chunks and job.id not in first:
                first[job.id] = time.monotonic()
        return all(job.is_over for job in jobs)

    place.wait(are_over, timeout_s=300)
    found = []
    for job in jobs:
        if job.status != "COMPLETED" or job.started is None or job.ended is None:
            raise RuntimeError(f"A stream ended as {job.status}: {job.error}")
        said = job.output[-1]["usage"]["completion_tokens"]
        total = job.ended - job.started
        found.append(Stream(first[job.id] - job.started, total, said, len(job.chunks)))
    return found


def measure(place: Endpoint, delay_s: float, num_streams: int, options: Any) -> dict[str, Any]:
    """Returns the medians over all streams of all rounds."""
    place.platform.faults.delay_s["job-stream"] = delay_s
    rounds = [
        streams(place, num_streams, options.tokens, 1000 * each) for each in range(options.rounds)
    ]
    every = [stream for each in rounds for stream in each]
    return {
        "post_ms": round(delay_s * 1000),
        "streams": num_streams,
        "first_token_ms": round(1000 * statistics.median(s.first_token_s for s in every), 1),
        "tokens_per_s": round(
            statistics.median(
                sum(s.num_tokens for s in each) / max(s.total_s for s in each) for each in rounds
            ),
            1,
        ),
        "posts_per_100_tokens": round(
            100 * sum(s.num_posts for s in every) / sum(s.num_tokens for s in every), 1
        ),
    }


def unstreamed(place: Endpoint, num_tokens: int, rounds: int) -> float:
    """Returns the tokens per second of jobs without a stream."""
    speeds = []
    for number in range(rounds):
        job = place.done(ask(5000 + number, num_tokens))
        if job.status != "COMPLETED" or job.started is None or job.ended is None:
            raise RuntimeError(f"The job ended as {job.status}: {job.error}")
        speeds.append(num_tokens / (job.ended - job.started))
    return round(statistics.median(speeds), 1)


def main() -> int:
    """Returns the command."""
    parser = new_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=100, help="of each stream")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--delays-ms", type=float, nargs="+", default=[0, 20, 100])
    options = parser.parse_args()
    print(
        f"{'a post holds':>14} {'post ms':>8} {'streams':>8} {'first ms':>9} {'tok/s':>8} posts/100"
    )
    results: dict[str, Any] = {}
    for name, script in WORKERS.items():
        with endpoint(script) as place:
            place.done(ask(0, 8))  # starts the model
            results[name] = {"unstreamed_tokens_per_s": unstreamed(place, options.tokens, 3)}
            levels = results[name]["levels"] = []
            for num_streams in options.streams:
                for delay_ms in options.delays_ms:
                    level = measure(place, delay_ms / 1000, num_streams, options)
                    levels.append(level)
                    print(
                        f"{name:>14} {level['post_ms']:>8} {num_streams:>8} "
                        f"{level['first_token_ms']:>9} {level['tokens_per_s']:>8} "
                        f"{level['posts_per_100_tokens']}",
                        flush=True,
                    )
            print(f"{name:>14} not streamed: {results[name]['unstreamed_tokens_per_s']} tok/s")
    publish("streaming", {"tokens": options.tokens, "posts": results}, options.save)
    return 0


if __name__ == "__main__":
    sys.exit(main())
