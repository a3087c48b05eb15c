"""What any thread may tell the engine's thread: new sequences, aborts, stop. Refuses when full.

Knows no scheduling; it only counts how many sequences are alive.
"""

from threading import Condition
from typing import NamedTuple

from serve_app.engine.outbox import Stream
from serve_app.engine.sequence import Sequence
from serve_app.errors import Draining, EngineDead, QueueFull, ServeError


class Mail(NamedTuple):
    """Everything that arrived since the engine's thread last looked."""

    accepted: list[tuple[Sequence, Stream]]
    aborted: list[Sequence]
    is_stopping: bool


class Inbox:
    """Holds mail for the engine's thread. At most `max_alive` sequences are alive at once."""

    def __init__(self, max_alive: int, retry_after_s: int) -> None:
        self._max_alive = max_alive
        self._retry_after_s = retry_after_s
        self._mail = Mail([], [], False)
        self._changed = Condition()
        self._num_alive = 0
        self._refusal: type[ServeError] | None = None

    def submit(self, sequence: Sequence, stream: Stream) -> None:
        """Accepts a sequence; raises `QueueFull`, `Draining` or `EngineDead` instead."""
        with self._changed:
            if self._refusal is not None:
                raise self.refused()
            if self._num_alive >= self._max_alive:
                raise QueueFull(
                    "Too many requests are waiting; send this one again a little later.",
                    retry_after_s=self._retry_after_s,
                )
            self._num_alive += 1
            self._mail.accepted.append((sequence, stream))
            self._changed.notify()

    def abort(self, sequence: Sequence) -> None:
        """Asks that an accepted sequence end; the engine's thread does so before its next step."""
        with self._changed:
            self._mail.aborted.append(sequence)
            self._changed.notify()

    def stop(self) -> None:
        """Refuses whatever comes from now on, and tells the engine's thread to end."""
        with self._changed:
            self._refusal = self._refusal or Draining
            self._mail = self._mail._replace(is_stopping=True)
            self._changed.notify()

    def die(self) -> None:
        """Refuses whatever comes from now on, with `EngineDead`."""
        with self._changed:
            self._refusal = EngineDead

    def take(self, *, wait: bool) -> Mail:
        """All mail; with `wait`, sleeps until there is some."""
        with self._changed:
            while wait and self._mail == ([], [], False):
                self._changed.wait()
            mail, self._mail = self._mail, Mail([], [], self._mail.is_stopping)
            return mail

    def ended(self) -> None:
        """Tells that one sequence is no longer alive."""
        with self._changed:
            self._num_alive -= 1

    @property
    def num_unread(self) -> int:
        return len(self._mail.accepted)

    @property
    def is_dead(self) -> bool:
        return self._refusal is EngineDead

    def refused(self) -> ServeError:
        """A new error that says why nothing is accepted any more."""
        if self._refusal is EngineDead:
            return EngineDead("The engine has failed; send the request to another server.")
        return Draining(
            "The server is shutting down; send the request again.",
            retry_after_s=self._retry_after_s,
        )
