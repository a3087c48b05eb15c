"""EngineStreams: answers of an engine that go on until a block ends, and the gaps between them."""

import asyncio
import time
from itertools import pairwise
from types import TracebackType

from serve_app.engine.engine import Engine
from serve_app.engine.sampling_params import SamplingParams

SETTLED = 8
"""Deliveries of each stream before the block begins."""
MAX_TOKENS = 4000
"""The longest answer of a stream."""


class EngineStreams:
    """Streams that run while an `async with` block runs. A stream that ends in it is an error."""

    def __init__(self, engine: Engine, prompts: list[list[int]]) -> None:
        self._engine = engine
        self._prompts = prompts
        self._tasks: list[asyncio.Task[None]] = []
        self._times: list[list[float]] = [[] for _ in prompts]
        # How many deliveries are waited for, and whether a stream has them.
        self._wanted = SETTLED
        self._has_wanted = [asyncio.Event() for _ in prompts]

    async def __aenter__(self) -> "EngineStreams":
        self._tasks = [asyncio.create_task(self._read(n)) for n in range(len(self._prompts))]
        try:
            await self._until_wanted()
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        await self._close()

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _read(self, number: int) -> None:
        prompt, times = self._prompts[number], self._times[number]
        longest = self._engine.config.max_sequence_len - len(prompt)
        params = SamplingParams(min(MAX_TOKENS, longest), temperature=0.7, ignore_eos=True)
        async for _ in self._engine.generate(prompt, params):
            times.append(time.perf_counter())
            if len(times) >= self._wanted:
                self._has_wanted[number].set()

    async def delivered(self) -> None:
        """Waits for the next delivery of every stream; raises the error of a stream that ended."""
        self._wanted = max(map(len, self._times), default=0) + 1
        for event in self._has_wanted:
            event.clear()
        await self._until_wanted()

    async def _until_wanted(self) -> None:
        async def wanted() -> None:
            for event in self._has_wanted:
                await event.wait()

        waiting = asyncio.create_task(wanted())
        await asyncio.wait([waiting, *self._tasks], return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            waiting.cancel()
            ended = next(task for task in self._tasks if task.done())
            ended.result()
            raise RuntimeError("A stream ended before the prompts beside it.")

    def gaps(self, windows: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
        """Returns the seconds between deliveries: those that overlap one of `windows`, and the
        others."""
        during, others = list[float](), list[float]()
        for times in self._times:
            for began, ended in pairwise(times):
                is_during = any(began < end and ended > start for start, end in windows)
                (during if is_during else others).append(ended - began)
        return during, others
