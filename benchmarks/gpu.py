"""The engine on a GPU: tokens per second beside what the memory allows. No download.

    python -m benchmarks.gpu --save benchmarks/results/gpu-h200.json
    python -m benchmarks.gpu --layers 4                  # a quick look, or a small card
    python -m benchmarks.gpu --tiny --device cpu         # does all of it run

First correctness, then speed: the copy bandwidth, the step at several batch sizes with contexts of
`--context` tokens, prefill, and each kernel alone. Weights are random (`random_model`), in NF4 or,
with `--weights bf16`, floats; 24 GB or 93 GB at all layers. Needs torch, triton and numpy alone.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.device import Device
from benchmarks.kernels import interpret, shapes_of
from benchmarks.kernels import measure as kernels
from benchmarks.machine import describe, publish
from benchmarks.random_model import config_of, random_model
from benchmarks.roofline import decode_bytes, decode_limit, prefill_flops
from serve_app.engine.flight import Flight, looking_ahead
from serve_app.engine.runner import ModelRunner
from serve_app.engine.sequence import Chunk, SamplingParams, Sequence
from serve_app.model.config import MixtralConfig
from serve_app.model.footprint import kv_bytes
from serve_app.model.kernel_check import relative_errors
from serve_app.model.stacked import Quantization

BATCHES = (1, 8, 32, 128)
PROMPT = 4096
BLOCK_SIZE = 16
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
ROUND = 16
"""Steps between two looks at the clock."""
EXTRA = 320
"""Tokens that a sequence may get while it is measured."""
SPARE = 3e9
"""Bytes of a device that are left to intermediate results."""


class Bench:
    """A model with random weights, a cache full of random keys and values, and a clock."""

    def __init__(self, options: argparse.Namespace, device: Device) -> None:
        self.device, self.options = device, options
        self.dtype = torch.bfloat16 if device.is_cuda else torch.float32
        self.config = config_of(tiny=options.tiny, layers=options.layers)
        self.absmax = None if options.weights == "bf16" else options.absmax
        self.quantization = None if self.absmax is None else Quantization("nf4", self.absmax)
        self.model = random_model(self.config, self.quantization, self.dtype, device.device)
        self.batches = [n for n in options.batches if n <= self._most_sequences()]
        tokens = max(max(self.batches) * (options.context + EXTRA), options.prompt)
        sizes = (-(-tokens // BLOCK_SIZE), BLOCK_SIZE)
        most_rows = max(self.batches)
        made = (self.model, *sizes, self.dtype, device.device)
        self.runner = ModelRunner(*made, most_rows=most_rows)
        for pages in (*self.runner.cache.keys, *self.runner.cache.values):
            pages.normal_()

    def _most_sequences(self) -> int:
        if not self.device.is_cuda:
            return 8
        free = torch.cuda.mem_get_info(self.device.device)[0] - SPARE
        return int(free / kv_bytes(self.config, self.options.context + EXTRA, self.dtype.itemsize))

    def release(self) -> None:
        """Gives the model's memory back."""
        del self.model, self.runner
        if self.device.is_cuda:
            torch.cuda.empty_cache()

    def sequences(self, count: int, num_tokens: int, **how: Any) -> list[Sequence]:
        """`count` sequences whose tokens but the last are computed, each with its own blocks."""
        blocks = -(-(num_tokens + EXTRA) // BLOCK_SIZE)
        params = SamplingParams(512, ignore_eos=True, **how)
        made = []
        for i in range(count):
            ids = torch.randint(self.config.vocab_size, (num_tokens,)).tolist()
            sequence = Sequence(ids, params, seed=i, stop_ids=frozenset())
            sequence.block_table = list(range(i * blocks, (i + 1) * blocks))
            sequence.num_computed = num_tokens - 1
            made.append(sequence)
        return made

    def decode(self, batch: int) -> float:
        """Tokens per second of `batch` sequences that are sampled, one step after the other."""
        sequences = self.sequences(batch, self.options.context, temperature=0.7)
        decode(self.runner, sequences, 2)
        steps, began = 0, time.perf_counter()
        while steps < ROUND or (steps < 256 and time.perf_counter() - began < self.options.seconds):
            decode(self.runner, sequences, ROUND)
            steps += ROUND
        self.device.wait()
        return float(batch * steps / (time.perf_counter() - began))

    def prefill(self) -> float:
        """Tokens per second of one prompt, in one step."""
        prompt = self.sequences(1, self.options.prompt, temperature=0.0)[0]
        whole = [Chunk(prompt, 0, self.options.prompt, True)]
        prompt.block_table = list(range(-(-self.options.prompt // BLOCK_SIZE)))
        seconds = self.device.seconds(lambda: self.runner.step(whole), repeats=3)
        return float(self.options.prompt / seconds)


def decode(runner: ModelRunner, sequences: list[Sequence], num_steps: int) -> None:
    """So many steps in which every sequence gets a token, as the engine makes them: each is started
    before the last one's tokens are read, where the runner can."""
    before: Flight | None = None
    ahead = looking_ahead(runner)
    for _ in range(num_steps):
        chunks = [Chunk(s, len(s.token_ids) - 1, len(s.token_ids), True) for s in sequences]
        flight = Flight.start(runner, ahead, chunks)
        read(before)
        before = flight
    read(before)


def read(flight: Flight | None) -> None:
    """Waits for a step, and gives its sequences their tokens."""
    if flight is not None:
        for chunk, token in zip(flight.chunks, flight.outcome.samples().token_ids, strict=True):
            chunk.sequence.token_ids[chunk.end] = token


def check(bench: Bench) -> dict[str, float]:
    """Relative errors beside plain float32; ends the program where one is too large."""
    found: dict[str, float] = {}
    if bench.quantization is not None:
        with torch.inference_mode():
            found = relative_errors(bench.quantization, bench.dtype, bench.device.device)
    for name, error in found.items():
        print(f"{name}: relative error {error:.1e}")
        if not error <= TOLERANCE[bench.dtype]:
            sys.exit(f"{name} is wrong on this device: nothing is measured.")
    return found


def decode_table(bench: Bench, bandwidth: float) -> list[dict[str, Any]]:
    """A row for each batch size, printed as it is measured."""
    context, item_bytes = bench.options.context, bench.dtype.itemsize
    print(f"{'batch':>6} {'tokens/s':>10} {'ms/step':>9} {'limit':>10} {'share':>6}")
    rows = []
    for batch in bench.batches:
        speed = bench.decode(batch)
        sizes = (bench.config, bench.absmax, batch, context, item_bytes)
        limit = decode_limit(*sizes, bandwidth)
        row = {
            "batch": batch,
            "tokens_per_s": round(speed, 1),
            "ms_per_step": round(1e3 * batch / speed, 3),
            "gb_per_step": round(decode_bytes(*sizes) / 1e9, 3),
            "limit": round(limit, 1),
            "share_of_limit": round(speed / limit, 3),
        }
        rows.append(row)
        took = row["ms_per_step"]
        print(f"{batch:>6} {speed:>10.1f} {took:>9} {limit:>10.1f} {speed / limit:>6.0%}")
    return rows


def product_flops(device: Device, config: MixtralConfig, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product on random numbers."""
    size = 8192 if device.is_cuda else 256
    a, b = (torch.randn(size, size, device=device.device).to(dtype) for _ in range(2))
    return 2.0 * size**3 / device.device_seconds(lambda: a @ b)


def measure(bench: Bench) -> dict[str, Any]:
    """The document, but for machine and options."""
    device = bench.device
    document: dict[str, Any] = {"relative_errors": check(bench)}
    bandwidth = device.copy_bandwidth()
    flops = product_flops(device, bench.config, bench.dtype)
    print(f"copy {bandwidth / 1e9:.0f} GB/s, matrix products {flops / 1e12:.1f} TFLOP/s")
    print(f"step: {bench.runner.note}")
    document |= {
        "step": bench.runner.note,
        "copy_gb_per_s": round(bandwidth / 1e9, 1),
        "product_tflops": round(flops / 1e12, 2),
        "decode": decode_table(bench, bandwidth),
    }
    speed, limit = bench.prefill(), flops / prefill_flops(bench.config)
    print(f"prefill of {bench.options.prompt} tokens: {speed:.0f} tokens/s, limit {limit:.0f}")
    document["prefill"] = {
        "tokens": bench.options.prompt,
        "tokens_per_s": round(speed, 1),
        "limit": round(limit, 1),
    }
    if bench.quantization is not None:
        bench.release()
        shapes = shapes_of(device, bench.quantization, tiny=bench.options.tiny)
        document["kernels"] = kernels(device, shapes, bandwidth, tiny=bench.options.tiny)
    return document


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", choices=["nf4", "bf16"], default="nf4")
    parser.add_argument("--absmax", choices=["nested", "bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--layers", type=int, help="instead of Mixtral's 32")
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--context", type=int, default=512, help="tokens of each sequence")
    parser.add_argument("--prompt", type=int, default=PROMPT, help="tokens of the prefill")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each batch size, about")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: says nothing about speed")
    parser.add_argument("--save", type=Path, help="also write the JSON document to this file")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.context, options.prompt = min(options.context, 40), min(options.prompt, 64)
        options.seconds, options.batches = 0.0, [n for n in options.batches if n <= 8]
    return options


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("No CUDA device: this benchmark measures a GPU; `--tiny --device cpu` only runs it.")
        return 1
    device = Device(torch.device(options.device))
    if not device.is_cuda:
        interpret()
    torch.manual_seed(0)
    began = time.perf_counter()
    bench = Bench(options, device)
    print(f"{device.describe()['device']}, {bench.config.num_layers} layers, {options.weights}")
    document = {
        "benchmark": "gpu",
        **describe(),
        **device.describe(),
        "layers": bench.config.num_layers,
        "weights": options.weights if bench.absmax is None else f"nf4, {bench.absmax} absmax",
        "context": options.context,
        **measure(bench),
        "seconds": round(time.perf_counter() - began, 1),
    }
    publish(document, options.save)
    return 0


if __name__ == "__main__":
    sys.exit(main())
