"""Answer: the answer to one prompt while the engine generates it."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from serve_app.api.metrics import Metrics
from serve_app.api.request_metrics import RequestMetrics
from serve_app.engine.sampling_params import SamplingParams
from serve_app.errors import InternalError
from serve_app.protocol.text import TextDelta, TextStream

if TYPE_CHECKING:
    from serve_app.engine.engine import Engine

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Answer:
    """A prompt with its parameters. Nothing runs before `stream` or `whole`; call one, once."""

    engine: "Engine"
    prompt_ids: list[int]
    params: SamplingParams
    text: TextStream
    metrics: Metrics
    arrived: float
    """`Call.arrived`."""
    deadline: float
    """On the same clock."""

    async def stream(
        self,
        to_items: Callable[[TextDelta], Iterable[T]],
        places: asyncio.Semaphore | None = None,
    ) -> AsyncGenerator[T, None]:
        """Yields the items that `to_items` makes of each delta.

        `places` limits how many answers of one request run at once: the first iteration waits for
        a place, and the end gives it back. Raises the errors of `Engine.generate`. Closing the
        generator frees the KV blocks.
        """
        place: AbstractAsyncContextManager[None] = nullcontext() if places is None else places
        async with place:
            observed = RequestMetrics(self.metrics, len(self.prompt_ids), self.arrived)
            deltas = self.engine.generate(self.prompt_ids, self.params, self.deadline)
            try:
                async with aclosing(deltas):
                    async for delta in deltas:
                        observed.delta(delta)
                        new = self.text.push(delta.token_ids, delta.logprobs, delta.finish_reason)
                        if new.finish_reason is not None:
                            break
                        for item in to_items(new):
                            yield item
                    else:
                        raise InternalError("The answer ended without a reason.")
            except BaseException as error:
                observed.failed(error)
                raise
            observed.ended(new.finish_reason, new.num_tokens)
        # After the blocks above, so that KV blocks are free before the client sees the end.
        for item in to_items(new):
            yield item

    async def whole(self, places: asyncio.Semaphore | None = None) -> TextDelta:
        """Waits for the end and returns the whole answer as one delta."""
        whole = TextDelta("")
        texts = []
        async with aclosing(self.stream(lambda delta: (delta,), places)) as deltas:
            async for delta in deltas:
                texts.append(delta.text)
                whole.scores += delta.scores
                whole.finish_reason = delta.finish_reason
                whole.num_tokens = delta.num_tokens
        whole.text = "".join(texts)
        return whole
