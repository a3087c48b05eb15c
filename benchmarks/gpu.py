"""The engine on a GPU: tokens per second beside what the memory allows. Downloads nothing.

    python -m benchmarks.gpu --save benchmarks/results/gpu-h200.json
    python -m benchmarks.gpu --layers 4                  # a quick look, or a small card
    python -m benchmarks.gpu --parts kernels             # one part only, 30 s
    python -m benchmarks.gpu --parts step --layers 4 --kernels triton
    python -m benchmarks.gpu --tiny --device cpu         # checks that all of it runs

Measures how fast the device reads, then correctness, then speed:

    step       decode steps by batch size and context length, greedy and sampled; lm_head and
               sampling alone
    prompts    the time to the first token, as the server cuts prompts, alone and beside streams;
               the cost table that `benchmarks.schedule` simulates
    profile    the kernels of a decode step and of a prompt, with launches and microseconds
    kernels    each kernel alone

Weights are random, in NF4 or, with `--weights bf16`, floats; all layers take 24 GB or 93 GB. What
the memory does not hold is left out and named. A part that fails is recorded under `failures` and
makes the exit code 1; the other parts are measured all the same. The file of `--save` is written
after every part. Needs torch, triton, numpy and cuda-bindings alone.
"""

import argparse
import sys

import torch

from benchmarks.device import Device
from benchmarks.gpu_decodes import measure_decodes
from benchmarks.gpu_prompts import measure_prompts
from benchmarks.kernels import interpret, shapes_of
from benchmarks.kernels import measure as measure_kernels
from benchmarks.random_runner import RandomRunner
from benchmarks.report import Report, new_parser, say
from benchmarks.step_kernels import measure_kernels_of_steps
from benchmarks.step_parts import measure_head, measure_sampling
from serve_app.model.kernels.kernel_check import relative_errors
from serve_app.model.quantization import Quantization

BATCHES = (1, 8, 32, 128)
CONTEXTS = (512, 4096, 32000)
PROMPTS = (64, 512, 4096)
STREAMS = (1, 32)
PARTS = ("products", "step", "prompts", "profile", "kernels")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def check(report: Report, quantization: Quantization, device: Device) -> None:
    """Records the relative errors of every implementation of a product compared with float32.
    Raises an error if one is wrong."""
    dtype = torch.bfloat16 if device.is_cuda else torch.float32
    with torch.inference_mode():
        found = relative_errors(quantization, dtype, device.device)
    report.figures["relative_errors"] = found
    for name, error in found.items():
        say(f"{name}: relative error {error:.1e}")
    wrong = [name for name, error in found.items() if not error <= TOLERANCE[dtype]]
    if wrong:
        raise ValueError(f"wrong on this device: {', '.join(wrong)}")


def ceilings(report: Report, device: Device) -> tuple[float, float]:
    """Measures bytes and operations per second of the device, with which speeds are compared."""
    bandwidth = device.read_bandwidth()
    flops = device.product_flops(torch.bfloat16 if device.is_cuda else torch.float32)
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
            raise ValueError(f"they are not used: {runner.kernels_note}; {runner.note}")
    if "step" in runner.options.parts:
        measure_step(report, runner, bandwidth)
    if "prompts" in runner.options.parts:
        with report.part("prompts"):
            measure_prompts(report, runner, flops)
    if "profile" in runner.options.parts:  # last: a profiler may slow down what comes after it
        with report.part("profile"):
            measure_kernels_of_steps(report, runner)


def measure_step(report: Report, runner: RandomRunner, bandwidth: float) -> None:
    """Measures decode steps of the engine's runner, and their parts."""
    with report.part("graphs"):
        error = report.figures["graph_error"] = runner.graph_error()
        say(f"a replayed step beside a launched one: {error}")
        if error is not None and not error <= TOLERANCE[runner.dtype]:
            raise ValueError("a replayed step differs from a launched one")
    with report.part("decode"):
        measure_decodes(report, runner, bandwidth)
    with report.part("head"), torch.inference_mode():
        measure_head(report, runner, bandwidth)
    with report.part("sampling"), torch.inference_mode():
        measure_sampling(report, runner)


def measure(report: Report, options: argparse.Namespace, device: Device) -> None:
    """Measures all parts that are asked for; failures go into the report."""
    quantization = None if options.weights == "bf16" else Quantization("nf4", "bfloat16")
    config = RandomRunner.config_of(options)
    say(f"{device.describe()['device']}, {config.num_hidden_layers} layers, {options.weights}")
    found: list[float] = []
    with report.part("ceilings"):
        found += ceilings(report, device)
    bandwidth, flops = found or (float("nan"),) * 2
    if quantization is not None and "products" in options.parts:
        with report.part("products"):
            check(report, quantization, device)
    if {"step", "prompts", "profile"} & set(options.parts):
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
    parser.add_argument("--kernels", choices=["cuda", "triton"], default="cuda", help="of products")
    parser.add_argument("--layers", type=int, help="instead of Mixtral's 32")
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument(
        "--contexts",
        type=int,
        nargs="+",
        default=list(CONTEXTS),
        help="tokens of each sequence; all parts but decode steps take the first",
    )
    parser.add_argument("--prompts", type=int, nargs="+", default=list(PROMPTS), help="in tokens")
    parser.add_argument("--streams", type=int, nargs="+", default=list(STREAMS), help="beside them")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each decode row, about")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: says nothing about speed")
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=list(PARTS))
    options = parser.parse_args(arguments)
    if options.tiny:
        options.contexts, options.seconds = [n // 16 + 8 for n in options.contexts], 0.0
        options.batches = [n for n in options.batches if n <= 8]
        options.prompts = [8 + n // 64 for n in options.prompts]
        options.streams = [min(n, 2) for n in options.streams]
    return options


def main(arguments: list[str] | None = None) -> int:
    """Returns the command."""
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
    figures["weights"] = "bf16" if options.weights == "bf16" else "nf4, bfloat16 absmax"
    report = Report("gpu", figures, options.save)
    measure(report, options, device)
    report.publish()
    for name, reason in report.figures["failures"].items():
        say(f"FAILED: {name}: {reason}", file=sys.stderr)
    return 1 if report.figures["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
