"""FakeRunner: prescribed logits and the real sampler; helpers that run requests on an engine."""

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from threading import Semaphore
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from serve_app.engine.delta import Delta, TokenLogprob
from serve_app.engine.engine import Engine
from serve_app.engine.engine_config import EngineConfig
from serve_app.engine.runner import InFlightStep, Runner
from serve_app.engine.sampler import Sampler
from serve_app.engine.sampling_params import SamplingParams
from serve_app.engine.scheduled_tokens import ScheduledTokens

VOCAB_SIZE = 50
EOS = 3

T = TypeVar("T")


class Logprob(NamedTuple):
    """A `TokenLogprob` that can be compared."""

    token_id: int
    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]

    @classmethod
    def of(cls, one: TokenLogprob) -> "Logprob":
        return cls(one.token_id, one.logprob, one.top_ids.tolist(), one.top_logprobs.tolist())


def logits_of(token_ids: list[int]) -> Tensor:
    """Logits `[vocab]`: arbitrary, but a function of the tokens so far alone."""
    generator = torch.Generator().manual_seed(random.Random(str(token_ids)).getrandbits(62))
    return torch.randn(VOCAB_SIZE, generator=generator) * 2


def repeat(*token_ids: int) -> Callable[[list[int]], Tensor]:
    """Logits whose greedy answer to any one-token prompt is `token_ids`, then eos."""

    def logits(so_far: list[int]) -> Tensor:
        row = torch.zeros(VOCAB_SIZE)
        row[(*token_ids, EOS)[min(len(so_far) - 1, len(token_ids))]] = 5
        return row

    return logits


class FakeRunner:
    """Computes nothing: samples from `logits` of a sequence's tokens.

    With `is_held`, each step waits for `allow`. `before` may raise in place of a step.
    """

    vocab_size = VOCAB_SIZE
    can_overlap_steps = False
    few_prompt_tokens = 0

    def __init__(
        self,
        logits: Callable[[list[int]], Tensor] = logits_of,
        *,
        is_held: bool = False,
        before: Callable[[list[ScheduledTokens]], None] = lambda scheduled: None,
    ) -> None:
        self.steps: list[list[ScheduledTokens]] = []
        self.cleared: list[int] = []
        self._logits = logits
        self._before = before
        self._sampler = Sampler()
        self._allowed = Semaphore(0)
        self._entered = Semaphore(0)
        self._is_held = is_held

    def allow(self, num_steps: int) -> None:
        self._allowed.release(num_steps)

    def let_go(self) -> None:
        self._is_held = False
        self._allowed.release()

    async def entered(self, num_steps: int) -> None:
        """Waits for `num_steps` more launches. Requests sent then are taken after the last one."""
        for _ in range(num_steps):
            await asyncio.to_thread(self._entered.acquire)

    def launch(self, scheduled: list[ScheduledTokens]) -> InFlightStep:
        self._entered.release()
        if self._is_held:
            self._allowed.acquire()
        self.steps.append(scheduled)
        self._before(scheduled)
        sampled = [part.sequence for part in scheduled if part.is_sampled]
        rows = [self._logits(sequence.token_ids) for sequence in sampled]
        logits = torch.stack(rows) if rows else torch.empty(0, VOCAB_SIZE)
        return self._sampler.sample(logits, sampled)

    def clear_blocks(self, blocks: list[int]) -> None:
        self.cleared += blocks


def config(**changes: Any) -> EngineConfig:
    limits: dict[str, Any] = {
        "max_model_len": 64,
        "max_num_seqs": 8,
        "max_waiting": 100,
        "block_size": 4,
        "num_blocks": 128,
        "max_num_batched_tokens": 32,
        "eos_token_ids": frozenset({EOS}),
    }
    return EngineConfig(**limits | changes)


@contextmanager
def running(runner: Runner, **changes: Any) -> Iterator[Engine]:
    """Starts an engine, and stops it at the end of the block."""
    engine = Engine(runner, config(**changes))
    engine.start()
    try:
        yield engine
    finally:
        if isinstance(runner, FakeRunner):
            runner.let_go()
        engine.stop()


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Runs `asyncio.run` with a time limit, so that a hanging test fails."""
    return asyncio.run(asyncio.wait_for(coroutine, timeout=60))


async def complete(
    engine: Engine, prompt_ids: list[int], params: SamplingParams
) -> tuple[list[int], str, list[Logprob]]:
    """Runs a request to its end. Returns tokens, finish reason and logprobs, and asserts that it
    ends once."""
    deltas = [delta async for delta in engine.generate(prompt_ids, params)]
    return joined(deltas)


def joined(deltas: list[Delta]) -> tuple[list[int], str, list[Logprob]]:
    assert [delta.finish_reason is not None for delta in deltas] == [False] * (len(deltas) - 1) + [
        True
    ]
    assert all(delta.token_ids or delta.finish_reason for delta in deltas)
    return (
        [token for delta in deltas for token in delta.token_ids],
        str(deltas[-1].finish_reason),
        [Logprob.of(logprob) for delta in deltas for logprob in delta.logprobs],
    )


def greedy(max_tokens: int, **changes: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, **changes)


async def start(
    engine: Engine, runner: FakeRunner, params: SamplingParams
) -> tuple[AsyncGenerator[Delta, None], Delta]:
    """Starts a request. Returns it with its first delta. The runner is held in the next launch."""
    request = engine.generate([1, 2], params)
    runner.allow(1)
    first = await anext(request)
    await runner.entered(2)
    return request, first


async def settled(engine: Engine) -> None:
    """Returns when the engine has taken all requests and aborts that were sent before."""
    await complete(engine, [9], greedy(1, ignore_eos=True))
