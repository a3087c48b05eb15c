"""A runner with prescribed logits and the real sampler, and a way to drive an engine with it."""

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from threading import Semaphore
from typing import Any, TypeVar

import torch
from torch import Tensor

from serve_app.engine.engine import Engine, EngineConfig
from serve_app.engine.runner import Runner
from serve_app.engine.sampler import Sampler
from serve_app.engine.sequence import Chunk, Delta, Samples, SamplingParams, TokenLogprob

VOCAB_SIZE = 50
EOS = 3

T = TypeVar("T")


def logits_of(token_ids: list[int]) -> Tensor:
    """`[vocab]`: arbitrary, but a function of the tokens so far alone."""
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

    Steps wait for `allow` when made with `is_held`. `before` may raise in place of a step.
    """

    vocab_size = VOCAB_SIZE

    def __init__(
        self,
        logits: Callable[[list[int]], Tensor] = logits_of,
        *,
        is_held: bool = False,
        before: Callable[[list[Chunk]], None] = lambda chunks: None,
    ) -> None:
        self.steps: list[list[Chunk]] = []
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
        """Returns when so many more steps have begun; what is sent then is read after the last."""
        for _ in range(num_steps):
            await asyncio.to_thread(self._entered.acquire)

    def step(self, chunks: list[Chunk]) -> Samples:
        self._entered.release()
        if self._is_held:
            self._allowed.acquire()
        self.steps.append(chunks)
        self._before(chunks)
        sampled = [chunk.sequence for chunk in chunks if chunk.samples]
        if not sampled:
            return Samples([], {})
        logits = torch.stack([self._logits(sequence.token_ids) for sequence in sampled])
        return self._sampler.sample(logits, sampled)


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
    """A started engine, stopped in the end."""
    engine = Engine(runner, config(**changes))
    engine.start()
    try:
        yield engine
    finally:
        if isinstance(runner, FakeRunner):
            runner.let_go()
        engine.stop()


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` that fails rather than hangs."""
    return asyncio.run(asyncio.wait_for(coroutine, timeout=60))


async def complete(
    engine: Engine, prompt_ids: list[int], params: SamplingParams
) -> tuple[list[int], str, list[TokenLogprob]]:
    """Tokens, finish reason and logprobs of a whole request; asserts that it ends once."""
    deltas = [delta async for delta in engine.generate(prompt_ids, params)]
    return joined(deltas)


def joined(deltas: list[Delta]) -> tuple[list[int], str, list[TokenLogprob]]:
    assert [delta.finish_reason is not None for delta in deltas] == [False] * (len(deltas) - 1) + [
        True
    ]
    assert all(delta.token_ids or delta.finish_reason for delta in deltas)
    return (
        [token for delta in deltas for token in delta.token_ids],
        str(deltas[-1].finish_reason),
        [logprob for delta in deltas for logprob in delta.logprobs],
    )


def greedy(max_tokens: int, **changes: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, **changes)


async def start(
    engine: Engine, runner: FakeRunner, params: SamplingParams
) -> tuple[AsyncGenerator[Delta, None], Delta]:
    """A request and its first delta; the runner, which is held, has begun the next step."""
    request = engine.generate([1, 2], params)
    runner.allow(1)
    first = await anext(request)
    await runner.entered(2)
    return request, first
