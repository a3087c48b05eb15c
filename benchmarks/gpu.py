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
from benchmarks.random_runner import RandomRunner
from benchmarks.roofline import decode_bytes, decode_limit, prefill_flops
from serve_app.model.config import MixtralConfig
from serve_app.model.kernel_check import relative_errors

BATCHES = (1, 8, 32, 128)
PROMPT = 4096
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def check(runner: RandomRunner) -> dict[str, float]:
    """Relative errors beside plain float32; ends the program where one is too large."""
    found: dict[str, float] = {}
    if runner.quantization is not None:
        with torch.inference_mode():
            found = relative_errors(runner.quantization, runner.dtype, runner.device.device)
    for name, error in found.items():
        print(f"{name}: relative error {error:.1e}")
        if not error <= TOLERANCE[runner.dtype]:
            sys.exit(f"{name} is wrong on this device: nothing is measured.")
    return found


def decode_table(runner: RandomRunner, bandwidth: float) -> list[dict[str, Any]]:
    """A row for each batch size, printed as it is measured."""
    context, item_bytes = runner.options.context, runner.dtype.itemsize
    print(f"{'batch':>6} {'tokens/s':>10} {'ms/step':>9} {'limit':>10} {'share':>6}")
    rows = []
    for batch in runner.batches:
        speed = runner.decode(batch)
        sizes = (runner.config, runner.absmax, batch, context, item_bytes)
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


def measure(runner: RandomRunner) -> dict[str, Any]:
    """The document, but for machine and options."""
    device = runner.device
    document: dict[str, Any] = {"relative_errors": check(runner)}
    bandwidth = device.copy_bandwidth()
    flops = product_flops(device, runner.config, runner.dtype)
    print(f"copy {bandwidth / 1e9:.0f} GB/s, matrix products {flops / 1e12:.1f} TFLOP/s")
    print(f"step: {runner.note}")
    document |= {
        "step": runner.note,
        "copy_gb_per_s": round(bandwidth / 1e9, 1),
        "product_tflops": round(flops / 1e12, 2),
        "decode": decode_table(runner, bandwidth),
    }
    speed, limit = runner.prefill(), flops / prefill_flops(runner.config)
    print(f"prefill of {runner.options.prompt} tokens: {speed:.0f} tokens/s, limit {limit:.0f}")
    document["prefill"] = {
        "tokens": runner.options.prompt,
        "tokens_per_s": round(speed, 1),
        "limit": round(limit, 1),
    }
    if runner.quantization is not None:
        runner.release()
        shapes = shapes_of(device, runner.quantization, tiny=runner.options.tiny)
        document["kernels"] = kernels(device, shapes, bandwidth, tiny=runner.options.tiny)
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
    runner = RandomRunner(options, device)
    print(f"{device.describe()['device']}, {runner.config.num_layers} layers, {options.weights}")
    document = {
        "benchmark": "gpu",
        **describe(),
        **device.describe(),
        "layers": runner.config.num_layers,
        "weights": options.weights if runner.absmax is None else f"nf4, {runner.absmax} absmax",
        "context": options.context,
        **measure(runner),
        "seconds": round(time.perf_counter() - began, 1),
    }
    publish(document, options.save)
    return 0


if __name__ == "__main__":
    sys.exit(main())
