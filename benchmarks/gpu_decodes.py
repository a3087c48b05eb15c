"""Measures decode steps of the engine's runner, greedy and sampled, and the time that reading the
weights takes."""

from typing import Any

from benchmarks.random_runner import RandomRunner
from benchmarks.report import Report, say
from benchmarks.roofline import decode_bytes, decode_limit

TEMPERATURES = (0.0, 0.7)


def measure_decodes(report: Report, runner: RandomRunner, bandwidth: float) -> None:
    """Prints and records a row for each batch size, context length and temperature.

    `bandwidth` is the speed of reading in bytes per second.
    """
    report.figures["decode"] = []
    report.figures["left_out"] = runner.left_out
    say(
        f"{'batch':>6} {'context':>8} {'temperature':>12} {'tokens/s':>10} {'ms/step':>9} "
        f"{'limit':>10} {'share':>6}"
    )
    for batch, context in runner.cases:
        for temperature in TEMPERATURES:
            with report.attempt(f"decode of {batch} at {context}, temperature {temperature}"):
                row = decode_row(runner, batch, context, temperature, bandwidth)
                report.figures["decode"].append(row)
    for reason in runner.left_out:
        say(f"left out: {reason}")


def decode_row(
    runner: RandomRunner, batch: int, context: int, temperature: float, bandwidth: float
) -> dict[str, Any]:
    """Measures one batch size and prints its row."""
    speed, num_distinct = runner.decode(batch, context, temperature)
    sizes = (runner.config, runner.quantization, batch, context, runner.dtype.itemsize)
    limit, took = decode_limit(*sizes, bandwidth), round(1e3 * batch / speed, 3)
    say(
        f"{batch:>6} {context:>8} {temperature:>12} {speed:>10.1f} {took:>9} "
        f"{limit:>10.1f} {speed / limit:>6.0%}"
    )
    return {
        "batch": batch,
        "context": context,
        "temperature": temperature,
        "tokens_per_s": round(speed, 1),
        "ms_per_step": took,
        "gb_per_step": round(decode_bytes(*sizes) / 1e9, 3),
        "limit": round(limit, 1),
        "share_of_limit": round(speed / limit, 3),
        "distinct_tokens": num_distinct,
    }
