"""Measures each of the GPU step's kernels alone, and the speed of only reading its bytes.

    python -m benchmarks.kernels

Products of 4-bit weights are measured in Triton and in CUDA. The bytes of a product are those of
its weights and absmax, read once; those of attention are the keys and values. Launches go round the
weights of several layers, so that no cache holds them, and are replayed as a CUDA graph, so that
the host's time is not measured. `benchmarks.gpu` runs this too.
"""

import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch

from benchmarks.cuda_cases import makers as cuda_makers
from benchmarks.device import Device
from benchmarks.kernel_cases import Case, Shapes, makers
from benchmarks.report import Report, new_parser, say
from serve_app.model.quantization import Quantization
from tools.random_model import config_of


def measure(
    report: Report, device: Device, shapes: Shapes, bandwidth: float, *, tiny: bool
) -> None:
    """Records a row of the report's `kernels` for each kernel and size."""
    report.figures["kernels"] = []
    say(f"{'kernel':>14} {'rows':>5} {'context':>8} {'us':>9} {'GB/s':>7} {'of read':>8}")
    measure_each(report, device, shapes, bandwidth, makers(tiny))
    if device.is_cuda:
        with report.part("kernels: cuda"):
            measure_each(report, device, shapes, bandwidth, cuda_makers(shapes))


def measure_each(
    report: Report,
    device: Device,
    shapes: Shapes,
    bandwidth: float,
    made: dict[str, Callable[[Shapes], Iterable[Case]]],
) -> None:
    """Times all cases of some kernels."""
    for name, make in made.items():
        with report.part(f"kernels: {name}"):
            for case in make(shapes):
                with report.attempt(f"kernels: {name} of {case[1]}"):
                    report.figures["kernels"].append(row_of(case, device, bandwidth))


def row_of(case: Case, device: Device, bandwidth: float) -> dict[str, Any]:
    """Times one case and prints its row."""
    name, tokens, context, num_bytes, count, work = case
    seconds = device.device_seconds(work) / count
    share = num_bytes / seconds / bandwidth
    us, speed = round(1e6 * seconds, 2), round(num_bytes / seconds / 1e9, 1)
    say(f"{name:>14} {tokens:>5} {context or '':>8} {us:>9} {speed:>7} {share:>8.0%}")
    row = {"kernel": name, "rows": tokens, "context": context, "us": us}
    return {**row, "gb_per_s": speed, "share_of_read": round(share, 3)}


def shapes_of(device: Device, quantization: Quantization, *, tiny: bool) -> Shapes:
    """Returns Mixtral's sizes for a GPU, or toy sizes for a CPU and Triton's interpreter."""
    config = config_of(tiny=tiny, layers=1)
    dtype = torch.bfloat16 if device.is_cuda else torch.float32
    layers, min_bytes = (1, 0) if tiny else (3, 256 << 20)
    return Shapes(config, quantization, dtype, device.device, layers, min_bytes)


def main(arguments: list[str] | None = None) -> int:
    """Returns the command."""
    parser = new_parser(__doc__)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("No CUDA device: there is nothing to measure.")
        return 1
    device = Device(torch.device("cuda"))
    torch.manual_seed(0)
    bandwidth = device.read_bandwidth()
    figures = {**device.describe(), "read_gb_per_s": round(bandwidth / 1e9, 1)}
    report = Report("kernels", figures, options.save)
    with torch.inference_mode():
        shapes = shapes_of(device, Quantization("nf4", "bfloat16"), tiny=False)
        measure(report, device, shapes, bandwidth, tiny=False)
    report.publish()
    return 1 if report.figures["failures"] else 0


def interpret() -> None:
    """Makes Triton's kernels run on a CPU. Call it before they are imported."""
    os.environ.setdefault("TRITON_INTERPRET", "1")


if __name__ == "__main__":
    sys.exit(main())
