"""From the engine's thread back to each request's event loop: one wake-up per loop and step.

What nobody has fetched yet is merged, so a slow consumer gets fewer and larger deltas and costs the
engine nothing. Knows no scheduling.
"""

from asyncio import AbstractEventLoop, Future

from serve_app.engine.sequence import Delta
from serve_app.errors import DeadlinePassed


class Stream:
    """One request's deltas, put and fetched in its own event loop."""

    def __init__(self, loop: AbstractEventLoop) -> None:
        self.loop = loop
        self._new: Delta | None = None
        self._waiter: Future[None] | None = None

    async def next(self) -> Delta:
        """Everything new; waits until there is something. One consumer only."""
        while self._new is None:
            self._waiter = self.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        delta, self._new = self._new, None
        return delta

    def put(self, delta: Delta) -> None:
        """Adds `delta`, which the stream may keep. Only from a callback of `loop`."""
        if self._new is None:
            self._new = delta
        else:
            self._new.token_ids += delta.token_ids
            self._new.logprobs += delta.logprobs
            self._new.finish_reason = delta.finish_reason
            self._new.error = delta.error
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def expire(self) -> None:
        """Ends the request for its consumer; the engine still has to be told. Like `put`."""
        error = DeadlinePassed(
            "The request took longer than the server allows; ask for fewer tokens, or try again."
        )
        self.put(Delta([], [], "cancelled", error))


class Outbox:
    """Collects a step's deltas, then delivers them with one callback per event loop."""

    def __init__(self) -> None:
        self._by_loop: dict[AbstractEventLoop, list[tuple[Stream, Delta]]] = {}

    def add(self, stream: Stream, delta: Delta) -> None:
        self._by_loop.setdefault(stream.loop, []).append((stream, delta))

    def flush(self) -> set[AbstractEventLoop]:
        """Delivers; returns the loops that are closed, whose consumers are gone."""
        by_loop, self._by_loop = self._by_loop, {}
        closed: set[AbstractEventLoop] = set()
        for loop, deltas in by_loop.items():
            try:
                loop.call_soon_threadsafe(_deliver, deltas)
            except RuntimeError:
                closed.add(loop)
        return closed


def _deliver(deltas: list[tuple[Stream, Delta]]) -> None:
    for stream, delta in deltas:
        stream.put(delta)
