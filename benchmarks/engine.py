"""The engine without a server: what a step costs the host, and how cost grows.

    python -m benchmarks.engine --save benchmarks/results/engine-cpu.json

`host` is processor time of the engine's thread per decode step with a model that computes nothing:
scheduling, batch, sampling, delivery. `decode` and `prefill` are the tiny model's tokens per second
over batch sizes and contexts. `waiting`, `prefix` and `intruder` are ratios of two runs side by
side. The consumers of the answers run on the same machine, as they do in a server.
"""

import asyncio
import statistics
import time
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from benchmarks.report import new_parser, publish
from benchmarks.timed_engine import CPU, MAX_NUM_SEQS, NullRunner, TimedEngine, read
from serve_app.engine.engine import Engine
from serve_app.engine.sampling_params import SamplingParams
from serve_app.model.checkpoint.checkpoint import inspect
from serve_app.model.checkpoint.loader import load
from serve_app.model.mixtral import Mixtral
from serve_app.tiny import CHECKPOINT

BATCHES = (1, 8, 16, 32, MAX_NUM_SEQS)
CONTEXTS = (64, 512, 2048)


def host_cost(model: Mixtral) -> dict[str, Any]:
    """Returns the microseconds of the engine's thread per step for each batch size, and a straight
    line through them."""
    bench, found = TimedEngine(model, NullRunner), {}
    for name, how in (
        ("greedy", {"temperature": 0.0}),
        ("sampled", {"temperature": 0.7, "top_p": 0.9}),
    ):
        costs = {}
        for batch in BATCHES:
            timed = bench.decode(batch, 64, 400, **how)
            costs[batch] = statistics.median(timed.decode_steps(batch)[1]) * 1e6
        slope, base = np.polyfit(list(costs), list(costs.values()), 1)
        found[name] = {
            "us_per_step": {str(batch): round(cost, 1) for batch, cost in costs.items()},
            "us_base": round(float(base), 1),
            "us_per_sequence": round(float(slope), 2),
        }
        print(f"host, {name}: {found[name]['us_per_step']} us; {base:.0f} + {slope:.1f} a sequence")
    return found


def model_speed(bench: TimedEngine) -> dict[str, Any]:
    """Returns the tokens per second of decode steps and of prefill."""
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
            timed = bench.decode(1, length, 2, temperature=0.0)
            seconds.append(timed.steps[-1][0] - timed.steps[0][0])
        prefill[str(length)] = round(length / statistics.median(seconds), 1)
    print(f"prefill: {prefill} tokens/s")
    return {"decode_tokens_per_s": decode, "prefill_tokens_per_s": prefill}


def waiting(bench: TimedEngine) -> float:
    """Returns the speed of 64 sequences with 2,000 more waiting, divided by the speed without."""

    def seconds_per_step(num_waiting: int) -> float:
        async def scenario(engine: Engine) -> None:
            long = SamplingParams(150, temperature=0.0, ignore_eos=True)
            running = [asyncio.create_task(read(engine, prompt, long)) for prompt in some]
            queued = [
                asyncio.create_task(read(engine, bench.prompt(32), long))
                for _ in range(num_waiting)
            ]
            await asyncio.sleep(0)  # all requests are in the queue before the first step
            engine.start()
            await asyncio.gather(*running)
            for task in queued:
                task.cancel()
            await asyncio.gather(*queued, return_exceptions=True)

        some = [bench.prompt(32) for _ in range(64)]
        clock, _ = bench.run(scenario)[1].decode_steps(64)
        return statistics.median(clock)

    ratios = [seconds_per_step(0) / seconds_per_step(2000) for _ in range(3)]
    return round(statistics.median(ratios), 3)


def prefix(bench: TimedEngine) -> dict[str, float]:
    """Returns the time to the first token of a prompt that shares 90 % with an earlier one, divided
    by the time of the earlier one, by length."""

    def ratio(length: int) -> float:
        async def scenario(engine: Engine) -> float:
            engine.start()
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


def intruder(bench: TimedEngine) -> dict[str, float]:
    """Returns the slowdown of 16 streams by a prompt of 8k tokens, and of the prompt by the
    streams."""
    long, one = bench.prompt(8192), SamplingParams(1, temperature=0.0, ignore_eos=True)

    async def alone(engine: Engine) -> float:
        engine.start()
        began = time.perf_counter()
        return (await read(engine, long, one))[0] - began

    async def among(engine: Engine) -> tuple[float, float, float]:
        engine.start()
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
    """Returns the seconds between tokens that came between `since` and `until`."""
    return [
        after - before for before, after in pairwise(times) if since <= before and after <= until
    ]


def main() -> None:
    """Runs the command."""
    parser = new_parser(__doc__)
    parser.add_argument("--threads", type=int, default=1, help="most threads of a step")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load(inspect(CHECKPOINT), dtype=torch.float32, device=CPU)
    bench = TimedEngine(model, max_threads=options.threads)
    figures = {"threads": options.threads, "host": host_cost(model), **model_speed(bench)}
    figures["speed_with_2000_waiting"] = waiting(bench)
    print(f"waiting: {figures['speed_with_2000_waiting']} of the speed without")
    figures["ttft_with_90_percent_shared"] = prefix(bench)
    figures["intruder"] = intruder(bench)
    publish("engine", figures, options.save)


if __name__ == "__main__":
    main()
