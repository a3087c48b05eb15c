"""Answer: generates the answer to one prompt with the engine."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from serve_app.api.list_places import ItemPlace
from serve_app.api.metrics.metrics import Metrics
from serve_app.api.metrics.request_metrics import RequestMetrics
from serve_app.api.tracing import AnswerTrace
from serve_app.engine.sampling_params import SamplingParams
from serve_app.engine.scheduling_class import DEFAULT_CLASS, SchedulingClass
from serve_app.engine.sequence import SharedPrompt
from serve_app.errors import InternalError
from serve_app.protocol.key_account import KeyAccount
from serve_app.protocol.scores import MAX_PER_CHUNK
from serve_app.protocol.text import TextDelta, TextStream

if TYPE_CHECKING:
    from serve_app.engine.engine import Engine

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Answer:
    """A prompt with its parameters. Call `stream` or `whole` once to generate the answer."""

    engine: "Engine"
    prompt_ids: list[int]
    params: SamplingParams
    text: TextStream
    metrics: Metrics
    arrived: float
    """Arrival time of the request, in seconds of `time.monotonic`."""
    deadline: float
    """Time at which the request ends with `DeadlinePassed`, on the same clock."""
    scheduling_class: SchedulingClass = DEFAULT_CLASS
    account: KeyAccount | None = None
    """The account of the request's API key; None without a key."""
    shared_prompt: SharedPrompt | None = None
    """Shared by all answers to this prompt; None if there is one answer."""
    trace: AnswerTrace | None = None
    """The spans of this answer; None if answers are not traced."""

    async def stream(
        self,
        to_items: Callable[[TextDelta], Iterable[T]],
        place: ItemPlace | None = None,
    ) -> AsyncGenerator[T, None]:
        """Yields the items that `to_items` returns for each delta.

        `place` is given for an item of a list: the first iteration waits for a place, and the end
        frees it. Raises the errors of `Engine.generate`. Closing the generator frees the KV blocks.
        """
        async with nullcontext() if place is None else place():
            observed = RequestMetrics(
                self.metrics, len(self.prompt_ids), self.arrived, self.account, self.trace
            )
            deltas = self.engine.generate(
                self.prompt_ids,
                self.params,
                self.deadline,
                self.scheduling_class,
                is_list_item=place is not None,
                shared_prompt=self.shared_prompt,
            )
            try:
                async with aclosing(deltas):
                    async for delta in deltas:
                        observed.delta(delta)
                        new = self.text.push(delta.token_ids, delta.logprobs, delta.finish_reason)
                        new.num_cached_tokens = delta.num_prompt_cached
                        new.prompt_logprobs += delta.prompt_logprobs
                        is_large = new.prompt_logprobs or len(new.scores) > MAX_PER_CHUNK
                        if new.finish_reason is not None:
                            break
                        for item in to_items(new):
                            yield item
                            if is_large:  # other requests run between two chunks
                                await asyncio.sleep(0)
                    else:
                        raise InternalError("The answer ended without a reason.")
            except BaseException as error:
                observed.failed(error)
                raise
            observed.ended(new.finish_reason, new.num_tokens)
        # Yields the last items after the blocks above, so that the KV blocks are free before the
        # client sees the end.
        for item in to_items(new):
            yield item
            if is_large:
                await asyncio.sleep(0)

    async def whole(self, place: ItemPlace | None = None) -> TextDelta:
        """Returns the whole answer as one delta. Waits for its end, and raises as `stream`."""
        whole = TextDelta("")
        texts = []
        async with aclosing(self.stream(lambda delta: (delta,), place)) as deltas:
            async for delta in deltas:
                texts.append(delta.text)
                whole.scores += delta.scores
                whole.prompt_logprobs += delta.prompt_logprobs
                whole.tool_calls += delta.tool_calls
                whole.finish_reason = delta.finish_reason
                whole.num_tokens = delta.num_tokens
                whole.num_cached_tokens = delta.num_cached_tokens
                whole.stop = delta.stop
        whole.text = "".join(texts)
        return whole
