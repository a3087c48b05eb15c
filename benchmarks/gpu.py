"""The engine on a GPU: tokens per second beside what the memory allows. Downloads nothing.

    python -m benchmarks.gpu --save benchmarks/results/gpu-h200.json
    python -m benchmarks.gpu --layers 4                  # a quick look, or a small card
    python -m benchmarks.gpu --parts kernels             # one part only
    python -m benchmarks.gpu --tiny --device cpu         # checks that all of it runs

Measures the copy bandwidth, then correctness, then speed: the step at several batch sizes with
contexts of `--context` tokens, prefill, and each kernel alone. Weights are random, in NF4 or, with
`--weights bf16`, floats; all layers take 24 GB or 93 GB. A part that fails is recorded under
`failures` and makes the exit code 1; the other parts are measured all the same. The file of
`--save` is written after every part. Needs torch, triton and numpy alone.
"""

import argparse
import sys
from typing import Any

import torch

from benchmarks.device import Device
from benchmarks.kernels import interpret, shapes_of
from benchmarks.kernels import measure as measure_kernels
from benchmarks.random_runner import RandomRunner
from benchmarks.report import Report, new_parser, say
from benchmarks.roofline import decode_bytes, decode_limit, prefill_flops
from serve_app.model.config import MixtralConfig
from serve_app.model.kernels.kernel_check import relative_errors
from serve_app.model.quantization import Quantization

BATCHES = (1, 8, 32, 128)
PROMPT = 4096
PARTS = ("products", "step", "kernels")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def check(report: Report, quantization: Quantization, device: Device) -> None:
    """Records the relative errors of every form of a product beside float32; raises where one is
    wrong."""
    dtype = torch.bfloat16 if device.is_cuda else torch.float32
    with torch.inference_mode():
        found = relative_errors(quantization, dtype, device.device)
    report.figures["relative_errors"] = found
    for name, error in found.items():
        say(f"{name}: relative error {error:.1e}")
    wrong = [name for name, error in found.items() if not error <= TOLERANCE[dtype]]
    if wrong:
        raise ValueError(f"wrong on this device: {', '.join(wrong)}")


def decode_table(report: Report, runner: RandomRunner, bandwidth: float) -> None:
    """Measures each batch size; prints and records a row for each."""
    report.figures["decode"] = []
    say(f"{'batch':>6} {'tokens/s':>10} {'ms/step':>9} {'limit':>10} {'share':>6}")
    for batch in runner.batches:
        with report.attempt(f"decode of {batch}"):
            report.figures["decode"].append(decode_row(runner, batch, bandwidth))


def decode_row(runner: RandomRunner, batch: int, bandwidth: float) -> dict[str, Any]:
    """Measures one batch size and prints its row."""
    speed = runner.decode(batch)
    sizes = (
        runner.config,
        runner.quantization,
        batch,
        runner.options.context,
        runner.dtype.itemsize,
    )
    limit, took = decode_limit(*sizes, bandwidth), round(1e3 * batch / speed, 3)
    say(f"{batch:>6} {speed:>10.1f} {took:>9} {limit:>10.1f} {speed / limit:>6.0%}")
    return {
        "batch": batch,
        "tokens_per_s": round(speed, 1),
        "ms_per_step": took,
        "gb_per_step": round(decode_bytes(*sizes) / 1e9, 3),
        "limit": round(limit, 1),
        "share_of_limit": round(speed / limit, 3),
    }


def product_flops(device: Device, config: MixtralConfig, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product on random numbers."""
    size = 8192 if device.is_cuda else 256
    a, b = (torch.randn(size, size, device=device.device).to(dtype) for _ in range(2))
    return 2.0 * size**3 / device.device_seconds(lambda: a @ b)


def ceilings(report: Report, device: Device, config: MixtralConfig) -> tuple[float, float]:
    """Measures bytes and operations per second of the device, with which speeds are compared."""
    bandwidth = device.copy_bandwidth()
    dtype = torch.bfloat16 if device.is_cuda else torch.float32
    flops = product_flops(device, config, dtype)
    say(f"copy {bandwidth / 1e9:.0f} GB/s, matrix products {flops / 1e12:.1f} TFLOP/s")
    report.figures["copy_gb_per_s"] = round(bandwidth / 1e9, 1)
    report.figures["product_tflops"] = round(flops / 1e12, 2)
    return bandwidth, flops


def measure_step(report: Report, runner: RandomRunner, bandwidth: float, flops: float) -> None:
    """Measures decodes and a prompt of the engine's runner."""
    say(f"step: {runner.note}")
    report.figures["step"] = runner.note
    with report.part("graphs"):
        error = report.figures["graph_error"] = runner.graph_error()
        say(f"a replayed step beside a launched one: {error}")
        if error is not None and not error <= TOLERANCE[runner.dtype]:
            raise ValueError("a replayed step differs from a launched one")
    with report.part("decode"):
        decode_table(report, runner, bandwidth)
    with report.part("prefill"):
        speed, limit = runner.prefill(), flops / prefill_flops(runner.config)
        say(f"prefill of {runner.options.prompt} tokens: {speed:.0f} tokens/s, limit {limit:.0f}")
        report.figures["prefill"] = {
            "tokens": runner.options.prompt,
            "tokens_per_s": round(speed, 1),
            "limit": round(limit, 1),
        }


def measure(report: Report, options: argparse.Namespace, device: Device) -> None:
    """Measures all parts that are asked for; failures go into the report."""
    quantization = None if options.weights == "bf16" else Quantization("nf4", options.absmax)
    config = RandomRunner.config_of(options)
    say(f"{device.describe()['device']}, {config.num_hidden_layers} layers, {options.weights}")
    found: list[float] = []
    with report.part("ceilings"):
        found += ceilings(report, device, config)
    bandwidth, flops = found or (float("nan"),) * 2
    if quantization is not None and "products" in options.parts:
        with report.part("products"):
            check(report, quantization, device)
    if "step" in options.parts:
        runner: RandomRunner | None = None
        with report.part("model"):
            runner = RandomRunner(options, device)
        if runner is not None:
            measure_step(report, runner, bandwidth, flops)
            runner.release()
    if quantization is not None and "kernels" in options.parts:
        with report.part("kernels"), torch.inference_mode():
            shapes = shapes_of(device, quantization, tiny=options.tiny)
            measure_kernels(report, device, shapes, bandwidth, tiny=options.tiny)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--weights", choices=["nf4", "bf16"], default="nf4")
    parser.add_argument("--absmax", choices=["nested", "bfloat16"], default="bfloat16")
    parser.add_argument("--layers", type=int, help="instead of Mixtral's 32")
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--context", type=int, default=512, help="tokens of each sequence")
    parser.add_argument("--prompt", type=int, default=PROMPT, help="tokens of the prefill")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each batch size, about")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: says nothing about speed")
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=list(PARTS))
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
    figures = device.describe()
    figures["layers"] = RandomRunner.config_of(options).num_hidden_layers
    figures["weights"] = "bf16" if options.weights == "bf16" else f"nf4, {options.absmax} absmax"
    figures["context"] = options.context
    report = Report("gpu", figures, options.save)
    measure(report, options, device)
    report.publish()
    for name, reason in report.figures["failures"].items():
        say(f"FAILED: {name}: {reason}", file=sys.stderr)
    return 1 if report.figures["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
