"""OutputQueue: sends deltas from the engine's thread to the event loops of their consumers.

A step causes at most one callback per event loop, for all streams of the loop. The first and the
last delta of a request are sent at once. The deltas between them are merged while the loop is busy
with earlier deltas, so that the loop has time for new requests. More streams, or a slower loop,
give fewer and larger deltas. The engine never waits for a slow consumer.

Example with `DELIVERY_SHARE` 0.125: if the loop took 10 ms for the last delivery, the next one is
sent 80 ms after the last one was sent, at the end of the step then running.
"""

import time
from asyncio import AbstractEventLoop
from collections.abc import Callable

from serve_app.engine.delta import Delta
from serve_app.engine.stream import Stream

DELIVERY_SHARE = 0.125
"""Maximum share of an event loop's time for deltas between the first and the last. With a smaller
share, text arrives in visible jerks; with a larger share, a busy loop sends fewer tokens/s."""
MAX_PAUSE_S = 0.2
"""Maximum pause after a delivery, in seconds. Without a maximum, a loop that was blocked once for
another reason would get its next deltas very late."""


class OutputQueue:
    """Collects the deltas of a step. All methods are called from the engine's thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._deliveries: dict[AbstractEventLoop, _Deliveries] = {}

    def add(self, stream: Stream, delta: Delta) -> None:
        """Adds `delta` to the deltas that `flush` sends. The caller must not use it afterwards."""
        deliveries = self._deliveries.get(stream.loop)
        if deliveries is None:
            deliveries = self._deliveries[stream.loop] = _Deliveries(stream.loop, self._clock)
        if (held := deliveries.held.pop(stream, None)) is not None:
            held.extend(delta)
            delta = held
        if stream.has_begun and delta.finish_reason is None:
            deliveries.held[stream] = delta
        else:
            stream.has_begun = True
            deliveries.urgent.append((stream, delta))

    def flush(self, *, is_pausing: bool = False) -> set[AbstractEventLoop]:
        """Sends the deltas that are due. `is_pausing` sends all of them, before a long step.

        Returns the event loops that are closed, whose consumers are gone.
        """
        closed: set[AbstractEventLoop] = set()
        for loop, deliveries in self._deliveries.items():
            try:
                deliveries.send(is_pausing)
            except RuntimeError:
                closed.add(loop)
        for loop in closed:
            del self._deliveries[loop]
        return closed


class _Deliveries:
    """The deltas for one event loop. Only the engine's thread uses the fields, except `_due`."""

    def __init__(self, loop: AbstractEventLoop, clock: Callable[[], float]) -> None:
        self.held: dict[Stream, Delta] = {}
        """Deltas that may wait while the loop is busy."""
        self.urgent: list[tuple[Stream, Delta]] = []
        """First and last deltas, which are sent at once."""
        self._loop = loop
        self._clock = clock
        self._due: float | None = 0.0
        """The time from which held deltas may be sent; None while a delivery is in progress."""

    def send(self, is_pausing: bool) -> None:
        """Sends the deltas that are due. Raises `RuntimeError` if the loop is closed."""
        now, due = self._clock(), self._due
        if self.held and (is_pausing or (due is not None and now >= due)):
            self._due = None
            deltas = [*self.urgent, *self.held.items()]
            self.held, self.urgent = {}, []
            self._loop.call_soon_threadsafe(self._deliver, deltas, now)
        elif self.urgent:
            deltas, self.urgent = self.urgent, []
            self._loop.call_soon_threadsafe(self._deliver, deltas, None)
        elif self._loop.is_closed():
            # Otherwise a delivery in progress on a closed loop would be awaited without end.
            raise RuntimeError("the event loop is closed")

    def _deliver(self, deltas: list[tuple[Stream, Delta]], sent: float | None) -> None:
        """Puts `deltas` into their streams. With `sent`, the time of sending held deltas, measures
        how long the loop is busy with them."""
        for stream, delta in deltas:
            stream.put(delta)
        if sent is not None:
            # Runs after the consumers that these deltas wake up.
            self._loop.call_soon(self._finish, sent)

    def _finish(self, sent: float) -> None:
        now = self._clock()
        self._due = min(sent + (now - sent) / DELIVERY_SHARE, now + MAX_PAUSE_S)
