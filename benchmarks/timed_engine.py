"""TimedEngine: engines around the tiny model whose steps are timed, for `benchmarks.engine`."""

import asyncio
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from serve_app.engine.engine import Engine
from serve_app.engine.engine_config import EngineConfig
from serve_app.engine.model_runner import ModelRunner
from serve_app.engine.runner import InFlightStep
from serve_app.engine.sampling_params import SamplingParams
from serve_app.engine.scheduled_tokens import ScheduledTokens
from serve_app.model.mixtral import Mixtral

CPU = torch.device("cpu")
MAX_NUM_SEQS = 64
BLOCK_SIZE = 16


class NullRunner(ModelRunner):
    """A runner whose model takes no time: it builds the batch, and all logits are 0."""

    def _logits(self, scheduled: list[ScheduledTokens]) -> torch.Tensor:
        return torch.zeros(len(self._batch(scheduled).sample_rows), self.vocab_size)


class TimedRunner:
    """A runner that records when each step began, by the clock and by its thread's time."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self.vocab_size = runner.vocab_size
        self.can_overlap_steps = runner.can_overlap_steps
        self.few_prompt_tokens = runner.few_prompt_tokens
        self.clear_blocks = runner.clear_blocks
        self.steps: list[tuple[float, float, int, int]] = []
        """Seconds by the clock, processor seconds of the thread, sequences, tokens."""

    def launch(self, scheduled: list[ScheduledTokens]) -> InFlightStep:
        num_tokens = sum(part.num_tokens for part in scheduled)
        self.steps.append((time.perf_counter(), time.thread_time(), len(scheduled), num_tokens))
        return self._runner.launch(scheduled)

    def decode_steps(self, batch: int) -> tuple[list[float], list[float]]:
        """Returns the seconds of each step that decodes `batch` sequences: by the clock, and of the
        thread."""
        pairs = [
            (then, now)
            for then, now in pairwise(self.steps)
            if then[2:] == now[2:] == (batch, batch)
        ]
        return [b[0] - a[0] for a, b in pairs], [b[1] - a[1] for a, b in pairs]


class TimedEngine:
    """Runs scenarios, each on a new engine around one model."""

    def __init__(
        self, model: Mixtral, runner: type[ModelRunner] = ModelRunner, max_threads: int = 1
    ) -> None:
        self.model = model
        self.runner = partial(runner, max_threads=max_threads)
        self.rng = np.random.default_rng(0)

    def prompt(self, num_tokens: int) -> list[int]:
        """Returns random token ids."""
        ids: list[int] = self.rng.integers(5, 400, num_tokens).tolist()
        return ids

    def run(self, scenario: Callable[[Engine], Any]) -> tuple[Any, TimedRunner]:
        """Starts the engine, runs the coroutine function `scenario` with it, and returns its
        result."""
        config = EngineConfig(
            max_model_len=12_288,
            max_num_seqs=MAX_NUM_SEQS,
            max_waiting=4096,
            block_size=BLOCK_SIZE,
            num_blocks=12_288,
            max_num_batched_tokens=512,
            eos_token_ids=frozenset(),
        )
        runner = self.runner(self.model, config.num_blocks, BLOCK_SIZE, torch.float32, CPU)
        timed = TimedRunner(runner)
        engine = Engine(timed, config)
        try:
            return asyncio.run(scenario(engine)), timed
        finally:
            engine.stop()

    def decode(self, batch: int, context: int, num_tokens: int, **how: Any) -> TimedRunner:
        """Decodes `batch` sequences together, each with `context` tokens before its answer."""

        async def scenario(engine: Engine) -> None:
            # The first sequences must still run when the last one's prompt is done.
            params = SamplingParams(num_tokens + batch * context // 400, ignore_eos=True, **how)
            prompts = [self.prompt(context) for _ in range(batch)]
            answers = [asyncio.create_task(read(engine, prompt, params)) for prompt in prompts]
            await asyncio.sleep(0)  # all requests are in the queue before the first step
            engine.start()
            await asyncio.gather(*answers)

        return self.run(scenario)[1]


async def read(engine: Engine, prompt: list[int], params: SamplingParams) -> list[float]:
    """Reads one answer. Returns when each token came."""
    times: list[float] = []
    async for delta in engine.generate(prompt, params):
        times += [time.perf_counter()] * len(delta.token_ids)
    return times
