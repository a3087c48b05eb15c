"""Stream: passes the deltas of one request to its consumer, in the consumer's event loop."""

from asyncio import AbstractEventLoop, Future

from serve_app.engine.delta import Delta
from serve_app.errors import DeadlinePassed


class Stream:
    """A queue of new deltas, merged into one, for one consumer."""

    def __init__(self, loop: AbstractEventLoop) -> None:
        self.loop = loop
        self.has_begun = False
        """Whether the first delta has been sent. Only the engine's thread uses it."""
        self._new: Delta | None = None
        self._waiter: Future[None] | None = None

    async def next(self) -> Delta:
        """Waits for new tokens or the end of the request. Returns them as one delta."""
        while self._new is None:
            self._waiter = self.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        delta, self._new = self._new, None
        return delta

    def put(self, delta: Delta) -> None:
        """Adds `delta`, which the stream may change later. Only callbacks of `loop` may call
        this."""
        if self._new is None:
            self._new = delta
        elif self._new.finish_reason is None:
            self._new.extend(delta)
        else:
            return  # the engine or the deadline has ended the request
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def expire(self) -> None:
        """Ends the stream with `DeadlinePassed`. The consumer then aborts the sequence."""
        error = DeadlinePassed(
            "The request took longer than the server allows. Ask for fewer tokens, or try again."
        )
        self.put(Delta([], [], "cancelled", error))
