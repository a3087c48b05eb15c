"""The kernels of a step, as torch's profiler counts them."""

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.random_runner import RandomRunner, decode
from benchmarks.report import Report, say
from serve_app.engine.scheduled_tokens import ScheduledTokens

STEPS = 8
"""Steps that are profiled together."""
SHOWN_SHARE = 0.01
"""Kernels with a smaller share of the time are recorded and not printed."""
NAME_LENGTH = 120

Table = dict[str, Any]
"""`{"us", "launches", "launches_per_layer", "kernels": [{"name", "launches", "us"}]}` of one step,
the longest kernel first."""


def measure_kernels_of_steps(report: Report, runner: RandomRunner) -> None:
    """Records the kernels of a sampled decode step for each batch size at the first context length,
    and of a step with each prompt."""
    tables = report.figures["step_kernels"] = []
    for batch in runner.batches:
        with report.attempt(f"kernels of a decode step of {batch}"):
            tables.append({"batch": batch, **kernels_of_decodes(runner, batch)})
            show(f"A decode step of {batch}", tables[-1])
    for num_tokens in runner.options.prompts:
        with report.attempt(f"kernels of a prompt of {num_tokens}"):
            tables.append({"prompt": num_tokens, **kernels_of_prompt(runner, num_tokens)})
            show(f"A prompt of {num_tokens} tokens", tables[-1])


def kernels_of_decodes(runner: RandomRunner, batch: int) -> Table:
    """Returns the kernels of a step of `batch` sequences at temperature 0.7."""
    sequences = runner.sequences(batch, runner.context, temperature=0.7)
    decode(runner.runner, sequences, 2)
    return profiled(runner, lambda: decode(runner.runner, sequences, STEPS))


def kernels_of_prompt(runner: RandomRunner, num_tokens: int) -> Table:
    """Returns the kernels of a step with one prompt that is not cut."""
    (sequence,) = runner.sequences(1, num_tokens)
    whole = [ScheduledTokens(sequence, 0, num_tokens, True)]
    runner.runner.launch(whole).wait()

    def work() -> None:
        for _ in range(STEPS):
            runner.runner.launch(whole).wait()

    return profiled(runner, work)


def profiled(runner: RandomRunner, work: Callable[[], None]) -> Table:
    """Profiles `work`, which takes `STEPS` steps. On a CPU, torch's operations stand for kernels.

    A kernel that is launched n times a step counts as n // layers launches a layer, so embedding,
    lm_head and sampling count only where the model has no more layers than they have launches.
    """
    is_cuda = runner.device.is_cuda
    runner.device.wait()
    with profile(activities=[ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU]) as found:
        work()
        runner.device.wait()
    kernels = rows_of(found, is_cuda=is_cuda)
    layers = runner.config.num_hidden_layers
    return {
        "us": round(sum(row["us"] for row in kernels), 1),
        "launches": round(sum(row["launches"] for row in kernels), 1),
        "launches_per_layer": sum(int(row["launches"]) // layers for row in kernels),
        "kernels": kernels,
    }


def rows_of(found: profile, *, is_cuda: bool) -> list[dict[str, Any]]:
    """Returns the rows of one step from a profile of `STEPS` steps."""
    wanted, rows = "CUDA" if is_cuda else "CPU", []
    for event in found.key_averages():
        total = event.self_device_time_total if is_cuda else event.self_cpu_time_total
        if event.device_type.name == wanted and total > 0:
            figures = {"launches": round(event.count / STEPS, 2), "us": round(total / STEPS, 2)}
            rows.append({"name": event.key[:NAME_LENGTH], **figures})
    return sorted(rows, key=lambda row: -row["us"])


def show(what: str, table: Table) -> None:
    """Prints the kernels with a share of at least `SHOWN_SHARE`."""
    say(
        f"{what}: {table['us']:.0f} us in {table['launches']:g} launches, "
        f"{table['launches_per_layer']} a layer"
    )
    for row in table["kernels"]:
        if row["us"] >= SHOWN_SHARE * table["us"]:
            say(f"{row['us']:>10.1f} us {row['launches']:>7g} x  {row['name'][:70]}")
