"""The engine without a server: what a step costs the host, and how cost grows.

    python -m benchmarks.engine --save benchmarks/results/engine-cpu.json

`host` is processor time of the engine's thread per decode step with a model that computes nothing:
scheduling, batch, sampling, delivery. `decode` and `prefill` are the tiny model's tokens per second
over batch sizes and contexts. `waiting`, `prefix` and `intruder` are ratios of two runs side by
side. Consumers share the machine with the engine, as they do in a server; no HTTP.
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import describe, publish
from serve_app.engine.engine import Engine
from serve_app.engine.engine_config import EngineConfig
from serve_app.engine.model_runner import ModelRunner
from serve_app.engine.runner import InFlightStep
from serve_app.engine.sampling_params import SamplingParams
from serve_app.engine.scheduled_tokens import ScheduledTokens
from serve_app.model.checkpoint.checkpoint import inspect
from serve_app.model.checkpoint.loader import load
from serve_app.model.mixtral import Mixtral
from serve_app.tiny import CHECKPOINT

CPU = torch.device("cpu")
BATCHES = (1, 8, 16, 32, 64)
CONTEXTS = (64, 512, 2048)
BLOCK_SIZE = 16


class NullRunner(ModelRunner):
    """A runner whose model takes no time: the batch is made, every row's logits are the same."""

    def _logits(self, scheduled: list[ScheduledTokens]) -> torch.Tensor:
        return torch.zeros(len(self._batch(scheduled).sample_rows), self.vocab_size)


class Watched:
    """A runner that records when each step began, by the clock and by its thread's time."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self.vocab_size = runner.vocab_size
        self.can_overlap_steps = runner.can_overlap_steps
        self.clear_blocks = runner.clear_blocks
        self.steps: list[tuple[float, float, int, int]] = []
        """Seconds by the clock, seconds of the thread, sequences, tokens."""

    def launch(self, scheduled: list[ScheduledTokens]) -> InFlightStep:
        num_tokens = sum(part.num_tokens for part in scheduled)
        self.steps.append((time.perf_counter(), time.thread_time(), len(scheduled), num_tokens))
        return self._runner.launch(scheduled)

    def decode_steps(self, batch: int) -> tuple[list[float], list[float]]:
        """Seconds of each step that decodes `batch` sequences: by the clock, and of the thread."""
        pairs = [
            (then, now)
            for then, now in pairwise(self.steps)
            if then[2:] == now[2:] == (batch, batch)
        ]
        return [b[0] - a[0] for a, b in pairs], [b[1] - a[1] for a, b in pairs]


class Bench:
    """One model, and engines around it."""

    def __init__(self, model: Mixtral, runner: type[ModelRunner] = ModelRunner) -> None:
        self.model = model
        self.runner = runner
        self.rng = np.random.default_rng(0)

    def prompt(self, num_tokens: int) -> list[int]:
        ids: list[int] = self.rng.integers(5, 400, num_tokens).tolist()
        return ids

    def run(self, scenario: Callable[[Engine], Any], **limits: Any) -> tuple[Any, Watched]:
        """What `scenario`, a coroutine function, returns with a new engine."""
        config = {
            "max_model_len": 12_288,
            "max_num_seqs": max(BATCHES),
            "max_waiting": 4096,
            "block_size": BLOCK_SIZE,
            "num_blocks": 12_288,
            "max_num_batched_tokens": 512,
            "eos_token_ids": frozenset[int](),
            **limits,
        }
        runner = self.runner(self.model, config["num_blocks"], BLOCK_SIZE, torch.float32, CPU)
        watched = Watched(runner)
        engine = Engine(watched, EngineConfig(**config))
        engine.start()
        try:
            return asyncio.run(scenario(engine)), watched
        finally:
            engine.stop()

    def decode(self, batch: int, context: int, num_tokens: int, **how: Any) -> Watched:
        async def scenario(engine: Engine) -> None:
            # The first ones must still run when the last one's prompt is done.
            params = SamplingParams(num_tokens + batch * context // 400, ignore_eos=True, **how)
            prompts = [self.prompt(context) for _ in range(batch)]
            await asyncio.gather(*(read(engine, prompt, params) for prompt in prompts))

        return self.run(scenario)[1]


async def read(engine: Engine, prompt: list[int], params: SamplingParams) -> list[float]:
    """Answers one request; when its tokens came."""
    times: list[float] = []
    async for delta in engine.generate(prompt, params):
        times += [time.perf_counter()] * len(delta.token_ids)
    return times


def host_cost(model: Mixtral) -> dict[str, Any]:
    """Microseconds of the engine's thread per step, and what a straight line through them says."""
    bench, found = Bench(model, NullRunner), {}
    for name, how in (
        ("greedy", {"temperature": 0.0}),
        ("sampled", {"temperature": 0.7, "top_p": 0.9}),
    ):
        costs = {}
        for batch in BATCHES:
            watched = bench.decode(batch, 64, 400, **how)
            costs[batch] = statistics.median(watched.decode_steps(batch)[1]) * 1e6
        slope, base = np.polyfit(list(costs), list(costs.values()), 1)
        found[name] = {
            "us_per_step": {str(batch): round(cost, 1) for batch, cost in costs.items()},
            "us_base": round(float(base), 1),
            "us_per_sequence": round(float(slope), 2),
        }
        print(f"host, {name}: {found[name]['us_per_step']} us; {base:.0f} + {slope:.1f} a sequence")
    return found


def model_speed(bench: Bench) -> dict[str, Any]:
    """Tokens per second of decode steps and of prefill."""
    decode: dict[str, dict[str, float]] = {}
    for context in CONTEXTS:
        decode[str(context)] = {}
        for batch in BATCHES if context < 2048 else BATCHES[:4]:
            clock, _ = bench.decode(batch, context, 80, temperature=0.0).decode_steps(batch)
            decode[str(context)][str(batch)] = round(batch / statistics.median(clock), 1)
        print(f"decode, context {context}: {decode[str(context)]} tokens/s")
    prefill = {}
    for length in (128, 512, 2048, 8192):
        seconds = []
        for _ in range(3):
            watched = bench.decode(1, length, 2, temperature=0.0)
            seconds.append(watched.steps[-1][0] - watched.steps[0][0])
        prefill[str(length)] = round(length / statistics.median(seconds), 1)
    print(f"prefill: {prefill} tokens/s")
    return {"decode_tokens_per_s": decode, "prefill_tokens_per_s": prefill}


def waiting(bench: Bench) -> float:
    """Speed of 64 sequences with 2,000 more waiting, as a share of the speed without."""

    def seconds_per_step(num_waiting: int) -> float:
        async def scenario(engine: Engine) -> None:
            long = SamplingParams(150, temperature=0.0, ignore_eos=True)
            running = [asyncio.create_task(read(engine, self_prompt, long)) for self_prompt in some]
            queued = [
                asyncio.create_task(read(engine, bench.prompt(32), long))
                for _ in range(num_waiting)
            ]
            await asyncio.gather(*running)
            for task in queued:
                task.cancel()
            await asyncio.gather(*queued, return_exceptions=True)

        some = [bench.prompt(32) for _ in range(64)]
        clock, _ = bench.run(scenario)[1].decode_steps(64)
        return statistics.median(clock)

    ratios = [seconds_per_step(0) / seconds_per_step(2000) for _ in range(3)]
    return round(statistics.median(ratios), 3)


def prefix(bench: Bench) -> dict[str, float]:
    """Time to first token with 90 % of a prompt shared, as a share of the cold one."""

    def ratio(length: int) -> float:
        async def scenario(engine: Engine) -> float:
            one = SamplingParams(1, temperature=0.0, ignore_eos=True)
            shared = bench.prompt(length * 9 // 10)
            waits = []
            for _ in range(2):
                began = time.perf_counter()
                times = await read(engine, shared + bench.prompt(length - len(shared)), one)
                waits.append(times[0] - began)
            return waits[1] / waits[0]

        return float(bench.run(scenario)[0])

    found = {
        str(length): round(statistics.median(ratio(length) for _ in range(3)), 3)
        for length in (2000, 8000)
    }
    print(f"prefix: time to first token is {found} of the cold one's")
    return found


def intruder(bench: Bench) -> dict[str, float]:
    """What an 8k-token prompt does to 16 running streams, and they to it."""
    long, one = bench.prompt(8192), SamplingParams(1, temperature=0.0, ignore_eos=True)

    async def alone(engine: Engine) -> float:
        began = time.perf_counter()
        return (await read(engine, long, one))[0] - began

    async def among(engine: Engine) -> tuple[float, float, float]:
        endless = SamplingParams(1500, temperature=0.0, ignore_eos=True)
        streams = [asyncio.create_task(read(engine, bench.prompt(64), endless)) for _ in range(16)]
        await read(engine, bench.prompt(64), SamplingParams(100, temperature=0.0, ignore_eos=True))
        began = time.perf_counter()
        ended = (await read(engine, long, one))[0]
        times = await asyncio.gather(*streams)
        before = [gap for t in times for gap in gaps(t, until=began)]
        during = [gap for t in times for gap in gaps(t, since=began, until=ended)]
        quantile = [float(np.quantile(some, 0.99)) for some in (before, during)]
        return quantile[0], quantile[1], ended - began

    alone_s = statistics.median(bench.run(alone)[0] for _ in range(3))
    runs = [bench.run(among)[0] for _ in range(3)]
    found = {
        "p99_inter_token": round(
            statistics.median(during / before for before, during, _ in runs), 2
        ),
        "time_of_the_prompt": round(statistics.median(took for *_, took in runs) / alone_s, 2),
    }
    print(f"intruder: {found} times what it is alone")
    return found


def gaps(times: list[float], since: float = 0.0, until: float = float("inf")) -> list[float]:
    """Seconds between tokens that came in a stretch of time."""
    return [
        after - before for before, after in pairwise(times) if since <= before and after <= until
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="compute threads")
    parser.add_argument("--save", type=Path, help="file for the last line's document")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load(inspect(CHECKPOINT), dtype=torch.float32, device=CPU)
    bench = Bench(model)
    document = {"benchmark": "engine", **describe(), "threads": options.threads}
    document["host"] = host_cost(model)
    document |= model_speed(bench)
    document["speed_with_2000_waiting"] = waiting(bench)
    print(f"waiting: {document['speed_with_2000_waiting']} of the speed without")
    document["ttft_with_90_percent_shared"] = prefix(bench)
    document["intruder"] = intruder(bench)
    publish(document, options.save)


if __name__ == "__main__":
    main()
