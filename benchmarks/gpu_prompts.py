"""Measures prompts through the engine on a GPU, alone and while streams are running."""

from typing import Any

from benchmarks.mixed_steps import SHORT, MixedSteps, step_times
from benchmarks.random_runner import RandomRunner
from benchmarks.report import Report, say
from benchmarks.roofline import prefill_flops


def measure_prompts(report: Report, runner: RandomRunner, flops: float) -> None:
    """Measures prompts through the engine, each size alone and with each number of streams.

    Prints and records a row for each, and the cost table. `flops` is the measured speed of matrix
    products in operations per second.
    """
    config = runner.engine_config()
    mixed = MixedSteps(runner.runner, config)
    context, rows = runner.context, list[dict[str, Any]]()
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
    is_gpu, few_tokens = runner.device.is_cuda, runner.runner.few_prompt_tokens
    table = step_times(
        how, config, decodes, context, mixed.steps, is_gpu=is_gpu, few_tokens=few_tokens
    )
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
