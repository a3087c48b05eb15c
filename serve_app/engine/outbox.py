"""From the engine's thread back to each request's event loop: one wake-up per loop and delivery.

A request's first delta and its last go out at once. What comes between is merged while the loop is
busy with what it has, so that telling tokens leaves it time for new requests: the more streams or
the slower the loop, the fewer and larger the deltas, and a slow consumer costs the engine nothing.
Knows no scheduling.
"""

import time
from asyncio import AbstractEventLoop, Future
from collections.abc import Callable

from serve_app.engine.sequence import Delta
from serve_app.errors import DeadlinePassed

DELIVERY_SHARE = 0.125
"""Of an event loop's time, for telling what comes between a request's first delta and its last.
With less, readers see their text come in jerks; with more, a busy loop answers fewer tokens/s."""
LONGEST_PAUSE_S = 0.2
"""After a delivery: whatever held the loop up once, readers are not to notice it twice."""


class Stream:
    """One request's deltas, put and fetched in its own event loop."""

    def __init__(self, loop: AbstractEventLoop) -> None:
        self.loop = loop
        self.has_begun = False
        """Whether its first delta is on its way; the engine's thread alone looks at it."""
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
        if self._new is not None and self._new.finish_reason is not None:
            return  # The engine, or the deadline, came first.
        self._new = delta if self._new is None else _merged(self._new, delta)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def expire(self) -> None:
        """Ends the request for its consumer; the engine still has to be told. Like `put`."""
        error = DeadlinePassed(
            "The request took longer than the server allows; ask for fewer tokens, or try again."
        )
        self.put(Delta([], [], "cancelled", error))


class Outbox:
    """Collects a step's deltas, then delivers them with one callback per event loop at most."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._couriers: dict[AbstractEventLoop, _Courier] = {}

    def add(self, stream: Stream, delta: Delta) -> None:
        courier = self._couriers.get(stream.loop)
        if courier is None:
            courier = self._couriers[stream.loop] = _Courier(stream.loop, self._clock)
        courier.add(stream, delta)

    def flush(self) -> set[AbstractEventLoop]:
        """Delivers what is due; returns the loops that are closed, whose consumers are gone."""
        closed: set[AbstractEventLoop] = set()
        for loop, courier in self._couriers.items():
            try:
                courier.send()
            except RuntimeError:
                closed.add(loop)
        for loop in closed:
            del self._couriers[loop]
        return closed


class _Courier:
    """The way to one event loop. Everything is the engine's thread's, but for `_due`."""

    def __init__(self, loop: AbstractEventLoop, clock: Callable[[], float]) -> None:
        self._loop = loop
        self._clock = clock
        self._held: dict[Stream, Delta] = {}
        self._urgent: list[tuple[Stream, Delta]] = []
        self._due: float | None = 0.0
        """When the next delivery may begin; None while one is under way."""

    def add(self, stream: Stream, delta: Delta) -> None:
        if (held := self._held.pop(stream, None)) is not None:
            delta = _merged(held, delta)
        if stream.has_begun and delta.finish_reason is None:
            self._held[stream] = delta
        else:
            stream.has_begun = True
            self._urgent.append((stream, delta))

    def send(self) -> None:
        """Raises `RuntimeError` where the loop is closed."""
        now, due = self._clock(), self._due
        if self._held and due is not None and now >= due:
            self._due = None
            deltas = [*self._urgent, *self._held.items()]
            self._held, self._urgent = {}, []
            self._loop.call_soon_threadsafe(self._deliver, deltas, now)
        elif self._urgent:
            deltas, self._urgent = self._urgent, []
            self._loop.call_soon_threadsafe(_put, deltas)
        elif self._loop.is_closed():
            # Else a delivery under way would be waited for in vain.
            raise RuntimeError("the event loop is closed")

    def _deliver(self, deltas: list[tuple[Stream, Delta]], sent: float) -> None:
        _put(deltas)
        # After all who were woken.
        self._loop.call_soon(self._delivered, sent)

    def _delivered(self, sent: float) -> None:
        now = self._clock()
        self._due = min(sent + (now - sent) / DELIVERY_SHARE, now + LONGEST_PAUSE_S)


def _put(deltas: list[tuple[Stream, Delta]]) -> None:
    for stream, delta in deltas:
        stream.put(delta)


def _merged(first: Delta, then: Delta) -> Delta:
    """`first` with what `then` adds."""
    first.token_ids += then.token_ids
    first.logprobs += then.logprobs
    first.finish_reason = then.finish_reason
    first.error = then.error
    return first
