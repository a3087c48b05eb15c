"""The engine on a GPU: tokens per second beside what the memory allows. Downloads nothing.

    python -m benchmarks.gpu --save benchmarks/results/gpu-h200.json
    python -m benchmarks.gpu --layers 4                  # a quick look, or a small card
    python -m benchmarks.gpu --parts kernels             # one part only, 30 s
    python -m benchmarks.gpu --parts step --layers 4 --kernels triton
    python -m benchmarks.gpu --tiny --device cpu         # checks that all of it runs

Measures how fast the device reads, then correctness, then speed: the step at several batch sizes
with contexts of `--context` tokens, prompts as the server cuts them, alone and beside streams, and
each kernel alone. It prints the cost table that `benchmarks.schedule` simulates. Weights are
random, in NF4 or, with `--weights bf16`, floats; all layers take 24 GB or 93 GB. A part that fails
is recorded under `failures` and makes the exit code 1; the other parts are measured all the same.
The file of `--save` is written after every part. Needs torch, triton, numpy and cuda-bindings
alone.
"""

import argparse
import sys
from typing import Any

import torch

from benchmarks.device import Device
from benchmarks.kernels import interpret, shapes_of
from benchmarks.kernels import measure as measure_kernels
from benchmarks.mixed_steps import SHORT, MixedSteps, step_times
from benchmarks.random_runner import RandomRunner
from benchmarks.report import Report, new_parser, say
from benchmarks.roofline import decode_bytes, decode_limit, prefill_flops
from serve_app.model.config import MixtralConfig
from serve_app.model.kernels.kernel_check import relative_errors
from serve_app.model.quantization import Quantization

BATCHES = (1, 8, 32, 128)
PROMPTS = (64, 512, 4096)
STREAMS = (1, 32)
PARTS = ("products", "step", "prompts", "kernels")
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
    bandwidth = device.read_bandwidth()
    dtype = torch.bfloat16 if device.is_cuda else torch.float32
    flops = product_flops(device, config, dtype)
    say(f"reading {bandwidth / 1e9:.0f} GB/s, matrix products {flops / 1e12:.1f} TFLOP/s")
    report.figures["read_gb_per_s"] = round(bandwidth / 1e9, 1)
    report.figures["product_tflops"] = round(flops / 1e12, 2)
    return bandwidth, flops


def measure_model(report: Report, runner: RandomRunner, bandwidth: float, flops: float) -> None:
    """Measures the parts that need the model."""
    for name, note in (("step", runner.note), ("products", runner.kernels_note)):
        report.figures[name] = note
        say(f"{name}: {note}")
    if runner.lacks_kernels:
        with report.part("CUDA kernels"):
            raise ValueError(f"they are not used: {runner.kernels_note}{runner.note}")
    if "step" in runner.options.parts:
        measure_step(report, runner, bandwidth)
    if "prompts" in runner.options.parts:
        with report.part("prompts"):
            measure_prompts(report, runner, flops)


def measure_step(report: Report, runner: RandomRunner, bandwidth: float) -> None:
    """Measures decodes of the engine's runner."""
    with report.part("graphs"):
        error = report.figures["graph_error"] = runner.graph_error()
        say(f"a replayed step beside a launched one: {error}")
        if error is not None and not error <= TOLERANCE[runner.dtype]:
            raise ValueError("a replayed step differs from a launched one")
    with report.part("decode"):
        decode_table(report, runner, bandwidth)


def measure_prompts(report: Report, runner: RandomRunner, flops: float) -> None:
    """Measures prompts through the engine, each size alone and beside each number of streams.

    Prints and records a row for each, and the cost table.
    """
    config = runner.engine_config()
    mixed = MixedSteps(runner.runner, config)
    context, rows = runner.options.context, list[dict[str, Any]]()
    decodes: dict[int, tuple[float, float]] = {}

    async def work() -> None:
        for batch in runner.batches:
            decodes[batch] = (await mixed.decode(batch, SHORT), await mixed.decode(batch, context))
        say(f"{'prompt':>6} {'streams':>7} {'first ms':>9} {'to alone':>8} {'gap ms':>8} longest")
        for tokens in runner.options.prompts:
            for streams in (0, *runner.streams):
                row = await mixed.prompts(tokens, streams, context)
                rows.append(prompt_row(row, rows, flops / prefill_flops(runner.config)))

    report.figures["prompts"] = rows
    mixed.run(runner.device.free_bytes(), work)
    how = f"measured: {report.figures['device']}, {report.figures['layers']} layers"
    is_gpu = runner.device.is_cuda
    table = step_times(how, config, decodes, context, mixed.steps, is_gpu=is_gpu)
    report.figures["step_times_ms"] = table._asdict()
    say(f"The cost table for step_times.py:\n{table}")


def prompt_row(row: dict[str, Any], before: list[dict[str, Any]], limit: float) -> dict[str, Any]:
    """Prints a row of `MixedSteps.prompts` and adds to it: of a prompt alone, tokens per second and
    their limit; beside streams, its time as a multiple of that alone."""
    tokens, first_ms = row["tokens"], row["first_token_ms"]
    alone = next((r for r in before if (r["tokens"], r["streams"]) == (tokens, 0)), None)
    if alone is None:
        row |= {"tokens_per_s": round(1e3 * tokens / first_ms, 1), "limit": round(limit, 1)}
    else:
        row["to_alone"] = round(first_ms / alone["first_token_ms"], 2)
    cells = [row.get(name, "-") for name in ("to_alone", "gap_ms", "longest_gap_ms")]
    say(f"{tokens:>6} {row['streams']:>7} {first_ms:>9} {cells[0]:>8} {cells[1]:>8} {cells[2]}")
    return row


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
    if {"step", "prompts"} & set(options.parts):
        runner: RandomRunner | None = None
        with report.part("model"):
            runner = RandomRunner(options, device)
        if runner is not None:
            measure_model(report, runner, bandwidth, flops)
            runner.release()
    if quantization is not None and "kernels" in options.parts:
        with report.part("kernels"), torch.inference_mode():
            shapes = shapes_of(device, quantization, tiny=options.tiny)
            measure_kernels(report, device, shapes, bandwidth, tiny=options.tiny)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--weights", choices=["nf4", "bf16"], default="nf4")
    parser.add_argument("--absmax", choices=["nested", "bfloat16"], default="bfloat16")
    parser.add_argument("--kernels", choices=["cuda", "triton"], default="cuda", help="of products")
    parser.add_argument("--layers", type=int, help="instead of Mixtral's 32")
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--context", type=int, default=512, help="tokens of each sequence")
    parser.add_argument("--prompts", type=int, nargs="+", default=list(PROMPTS), help="in tokens")
    parser.add_argument("--streams", type=int, nargs="+", default=list(STREAMS), help="beside them")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each batch size, about")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: says nothing about speed")
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=list(PARTS))
    options = parser.parse_args(arguments)
    if options.tiny:
        options.context, options.seconds = min(options.context, 40), 0.0
        options.batches = [n for n in options.batches if n <= 8]
        options.prompts = [8 + n // 64 for n in options.prompts]
        options.streams = [min(n, 2) for n in options.streams]
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
