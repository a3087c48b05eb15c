"""OutputQueue: sends deltas from the engine's thread to the event loops of their consumers.

A step causes at most one callback per event loop, however many streams the loop has. The first and
the last delta of a request are sent at once. Those between are merged while the loop is busy with
the deltas before, so that streaming leaves the loop time for new requests: more streams, or a
slower loop, give fewer and larger deltas. A slow consumer never makes the engine wait.
"""

import time
from asyncio import AbstractEventLoop
from collections.abc import Callable

from serve_app.engine.delta import Delta
from serve_app.engine.stream import Stream

DELIVERY_SHARE = 0.125
"""Share of an event loop's time that deltas between the first and the last may take. With less,
text arrives in visible jerks; with more, a busy loop answers fewer tokens a second."""
MAX_PAUSE_S = 0.2
"""Longest pause after a delivery. Without it, a loop that was blocked once for other reasons would
get its next deltas very late."""


class OutputQueue:
    """Collects the deltas of a step. All methods are called from the engine's thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._deliveries: dict[AbstractEventLoop, _Deliveries] = {}

    def add(self, stream: Stream, delta: Delta) -> None:
        """Takes over `delta`; `flush` sends it."""
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
        """Sends the deltas that are due; all of them before a long step, with `is_pausing`.

        Returns loops that are closed and have no consumers.
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
    """The deltas for one event loop. The engine's thread owns all fields but `_due`."""

    def __init__(self, loop: AbstractEventLoop, clock: Callable[[], float]) -> None:
        self.held: dict[Stream, Delta] = {}
        """Deltas that may wait for the loop."""
        self.urgent: list[tuple[Stream, Delta]] = []
        """First and last deltas."""
        self._loop = loop
        self._clock = clock
        self._due: float | None = 0.0
        """When the next delivery of held deltas may begin; None while one is in progress."""

    def send(self, is_pausing: bool) -> None:
        """Raises `RuntimeError` where the loop is closed."""
        now, due = self._clock(), self._due
        if self.held and (is_pausing or (due is not None and now >= due)):
            self._due = None
            deltas = [*self.urgent, *self.held.items()]
            self.held, self.urgent = {}, []
            self._loop.call_soon_threadsafe(self._deliver, deltas, now)
        elif self.urgent:
            deltas, self.urgent = self.urgent, []
            self._loop.call_soon_threadsafe(_put, deltas)
        elif self._loop.is_closed():
            # Otherwise a delivery in progress on a closed loop would be waited for without end.
            raise RuntimeError("the event loop is closed")

    def _deliver(self, deltas: list[tuple[Stream, Delta]], sent: float) -> None:
        _put(deltas)
        # Runs after the consumers that these deltas wake up.
        self._loop.call_soon(self._finish, sent)

    def _finish(self, sent: float) -> None:
        now = self._clock()
        self._due = min(sent + (now - sent) / DELIVERY_SHARE, now + MAX_PAUSE_S)


def _put(deltas: list[tuple[Stream, Delta]]) -> None:
    for stream, delta in deltas:
        stream.put(delta)
