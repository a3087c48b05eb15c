"""Prompts through the engine, alone and beside streams, and the cost table of the simulated device.

The engine is the product's, from its loop to the prefill policy, around the runner that is given.
So a prompt is cut into prefill chunks as the server cuts it. `StepTimes` made from the recorded
steps is what `benchmarks.schedule` simulates (`step_times.py`).
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from statistics import mean, median
from typing import Any, NamedTuple

import torch

from benchmarks.arrivals import ANSWER, PROMPTS
from benchmarks.engine_streams import EngineStreams
from benchmarks.step_times import StepTimes
from serve_app.engine.engine import Engine
from serve_app.engine.engine_config import EngineConfig
from serve_app.engine.runner import InFlightStep, Runner, SampledTokens
from serve_app.engine.sampling_params import SamplingParams
from serve_app.engine.scheduled_tokens import ScheduledTokens
from serve_app.engine.step_cost import StepCost, StepShape, shape_of
from serve_app.loading.warm_up import run_prompts

SHORT = 16
"""Tokens of a short context."""
REPEATS = 3
"""Prompts of each row."""


class Step(NamedTuple):
    """One step, and the seconds that the device worked on it."""

    shape: StepShape
    seconds: float


class RecordedRunner:
    """A `Runner` that keeps the sizes and device times of its steps."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.vocab_size = runner.vocab_size
        self.can_overlap_steps = runner.can_overlap_steps
        self.few_prompt_tokens = runner.few_prompt_tokens
        self.clear_blocks = runner.clear_blocks
        self.steps: list[Step] = []

    def launch(self, scheduled: list[ScheduledTokens]) -> InFlightStep:
        shape = shape_of(scheduled)
        return _RecordedStep(self._runner.launch(scheduled), shape, self.steps)


class _RecordedStep:
    def __init__(self, step: InFlightStep, shape: StepShape, steps: list[Step]) -> None:
        self._step, self._shape, self._steps = step, shape, steps

    def wait(self) -> SampledTokens:
        sampled = self._step.wait()
        self._steps.append(Step(self._shape, sampled.seconds))
        return sampled


class MixedSteps:
    """Runs prompts and streams on an engine of its own."""

    def __init__(self, runner: Runner, config: EngineConfig) -> None:
        self._runner = RecordedRunner(runner)
        self._engine = Engine(self._runner, config)
        self.steps = self._runner.steps
        """All steps so far."""

    def run(self, free_bytes: int, work: Callable[[], Awaitable[None]]) -> None:
        """Starts the engine, runs the prompts of a server's warm-up and then `work`.

        `free_bytes` is the device's free memory, for the error of a warm-up that lacks memory.
        """

        async def run() -> None:
            await work()

        self._engine.start()
        try:
            run_prompts(self._engine, self._runner.vocab_size, free_bytes)
            asyncio.run(run())
        finally:
            self._engine.stop()

    def _prompt(self, num_tokens: int) -> list[int]:
        ids: list[int] = torch.randint(self._runner.vocab_size, (num_tokens,)).tolist()
        return ids

    def _streams(self, count: int, context: int) -> EngineStreams:
        return EngineStreams(self._engine, [self._prompt(context) for _ in range(count)])

    async def decode(self, batch: int, context: int) -> float:
        """Returns the median device milliseconds of steps that decode `batch` streams and nothing
        else."""
        before = len(self.steps)
        async with self._streams(batch, context) as streams:
            await streams.delivered()
        return 1e3 * median(
            seconds
            for shape, seconds in self.steps[before:]
            if shape.num_decodes == batch and not shape.num_prompt_tokens
        )

    async def prompts(self, num_tokens: int, num_streams: int, context: int) -> dict[str, Any]:
        """`REPEATS` prompts of `num_tokens` tokens one after the other, beside streams that have
        `context` tokens before them.

        Returns medians in milliseconds: to the first token, of the device in the steps with prompt
        tokens, and of the streams' other gaps; the streams' longest gap; and the prompt tokens of
        each step of the last prompt.
        """
        windows, device_s, cuts = list[tuple[float, float]](), list[float](), list[int]()
        async with self._streams(num_streams, context) as streams:
            for _ in range(REPEATS):
                before, began = len(self.steps), time.perf_counter()
                await self._first_token(num_tokens)
                windows.append((began, time.perf_counter()))
                await streams.delivered()
                steps = [step for step in self.steps[before:] if step.shape.num_prompt_tokens]
                device_s.append(sum(step.seconds for step in steps))
                cuts = [step.shape.num_prompt_tokens for step in steps]
            during, others = streams.gaps(windows)
        seconds = {
            "first_token_ms": median(ended - began for began, ended in windows),
            "device_ms": median(device_s),
            **({"gap_ms": median(others), "longest_gap_ms": max(during)} if during else {}),
        }
        figures = {name: round(1e3 * each, 3) for name, each in seconds.items()}
        return {"tokens": num_tokens, "streams": num_streams, **figures, "cuts": cuts}

    async def _first_token(self, num_tokens: int) -> None:
        params = SamplingParams(1, temperature=0.0, ignore_eos=True)
        async for _ in self._engine.generate(self._prompt(num_tokens), params):
            pass


def step_times(
    source: str,
    config: EngineConfig,
    decodes: dict[int, tuple[float, float]],
    context: int,
    steps: list[Step],
    *,
    is_gpu: bool,
    few_tokens: int = 0,
) -> StepTimes:
    """Returns the cost table of a device.

    `decodes` has for each batch size the milliseconds of a step with contexts of `SHORT` and of
    `context` tokens. The parts of a prompt are those that the engine learns from `steps`.
    """
    largest = max(decodes)
    short_ms, long_ms = decodes[largest]
    context_ms = max(long_ms - short_ms, 0.0) / (largest * (context - SHORT))
    cost = StepCost(few_tokens)
    for shape, seconds in steps:
        cost.observe(shape, seconds)

    def prompt_ms(num_tokens: int, num_scores: int) -> float:
        return 1e3 * cost.seconds(StepShape(0, 0, num_tokens, num_scores))

    first = few_tokens + 1  # the smallest step of the larger form
    token = (prompt_ms(first + 1000, 1) - prompt_ms(first, 1)) / 1000
    score = (prompt_ms(first, 1001) - prompt_ms(first, 1)) / 1000
    fixed = max(prompt_ms(first, 1) - first * token - score, 0.0)
    few = few_token = 0.0
    if few_tokens > 1:
        few_token = (prompt_ms(few_tokens, 1) - prompt_ms(1, 1)) / (few_tokens - 1)
        few = max(prompt_ms(1, 1) - few_token - score, 0.0)
    # Full steps share the fixed part.
    per_token = token + fixed / config.max_num_batched_tokens
    request_ms = mean(PROMPTS) * per_token + ANSWER * short_ms / largest
    return StepTimes(
        source=source,
        decodes=tuple(
            (batch, round(max(short - context_ms * batch * SHORT, 0.0), 3))
            for batch, (short, _) in sorted(decodes.items())
        ),
        context_token=context_ms,
        prompt=round(fixed, 3),
        prompt_token=token,
        score=score,
        is_gpu=is_gpu,
        max_num_batched_tokens=config.max_num_batched_tokens,
        rate=round(1e3 / request_ms, 2),
        few_tokens=few_tokens,
        few=round(few, 3),
        few_token=few_token,
    )
