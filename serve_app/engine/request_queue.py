"""RequestQueue: brings new, aborted and stop requests from any thread to the engine's thread."""

from threading import Condition
from typing import NamedTuple

from serve_app.engine.sequence import Sequence
from serve_app.engine.stream import Stream
from serve_app.errors import Draining, EngineDead, QueueFull, ServeError


class Requests(NamedTuple):
    """Everything that has arrived since the last `take`."""

    accepted: list[tuple[Sequence, Stream]]
    aborted: list[Sequence]
    is_stopping: bool


class RequestQueue:
    """Accepts requests while fewer than `max_alive` sequences are alive (waiting or running)."""

    def __init__(self, max_alive: int, retry_after_s: int) -> None:
        self._max_alive = max_alive
        self._retry_after_s = retry_after_s
        self._requests = Requests([], [], False)
        self._changed = Condition()
        self._num_alive = 0
        self.has_failed = False
        self._refusal: type[ServeError] | None = None

    def submit(self, sequence: Sequence, stream: Stream) -> None:
        """Accepts a sequence; raises `QueueFull`, `Draining` or `EngineDead` instead."""
        with self._changed:
            if self._refusal is not None:
                raise self.refusal()
            if self._num_alive >= self._max_alive:
                raise QueueFull(
                    "Too many requests are waiting; send this one again a little later.",
                    retry_after_s=self._retry_after_s,
                )
            self._num_alive += 1
            self._requests.accepted.append((sequence, stream))
            self._changed.notify()

    def abort(self, sequence: Sequence) -> None:
        """Asks the engine to end an accepted sequence before its next step."""
        with self._changed:
            self._requests.aborted.append(sequence)
            self._changed.notify()

    def stop(self) -> None:
        """Refuses new requests with `Draining` and asks the engine's thread to end."""
        with self._changed:
            self._refusal = self._refusal or Draining
            self._requests = self._requests._replace(is_stopping=True)
            self._changed.notify()

    def fail(self) -> None:
        """Refuses new requests with `EngineDead`."""
        with self._changed:
            self._refusal = EngineDead
            self.has_failed = True

    def take(self, *, wait: bool) -> Requests:
        """Removes and returns all requests; with `wait`, sleeps until there is one."""
        with self._changed:
            while wait and self._requests == ([], [], False):
                self._changed.wait()
            taken, self._requests = self._requests, Requests([], [], self._requests.is_stopping)
            return taken

    def finish_one(self) -> None:
        """Counts one sequence as ended, which makes room for another."""
        with self._changed:
            self._num_alive -= 1

    @property
    def num_waiting(self) -> int:
        """Accepted requests that the engine's thread has not taken yet."""
        return len(self._requests.accepted)

    def refusal(self) -> ServeError:
        """A new error that says why no request is accepted any more."""
        if self._refusal is EngineDead:
            return EngineDead("The engine has failed; send the request to another server.")
        return Draining(
            "The server is shutting down; send the request again.",
            retry_after_s=self._retry_after_s,
        )
