"""RequestQueue: passes new requests, aborts and the stop signal to the engine's thread."""

from collections import Counter
from threading import Condition
from typing import NamedTuple

from serve_app.engine.retry_after import Places, RetryAfter
from serve_app.engine.sequence import Sequence
from serve_app.engine.stream import Stream
from serve_app.errors import FULL_QUEUE, Draining, EngineDead, QueueFull, ServeError

DYNAMIC_THRESHOLD = 2
"""A group may hold at most this multiple of the number of free places (dynamic thresholds:
Choudhury and Hahne, IEEE/ACM Transactions on Networking 6, 1998). So one group alone gets two
thirds of the places, two groups get two fifths each, and another group always finds free places.

Example with 150 places: a single group may hold 100, because 50 = 100 / 2 are free then."""
RECHECK_DIVISOR = 32
"""After a replica has reported a full queue, a proxy may refuse requests itself until about 1/32 of
the waiting places have become free."""


class Requests(NamedTuple):
    """All requests, aborts and the stop signal since the last `take`."""

    accepted: list[tuple[Sequence, Stream]]
    aborted: list[Sequence]
    is_stopping: bool


class RequestQueue:
    """A queue with `max_running` + `max_waiting` places.

    A single request holds a place until its sequence ends. A list of prompts holds one place until
    all its items have ended. The items hold no place and are never refused; the list limits the
    number of its concurrent items.
    """

    def __init__(self, max_running: int, max_waiting: int, retry_after_s: int) -> None:
        """`retry_after_s` is the minimum `Retry-After`, in seconds."""
        self._max_running = max_running
        self._num_recheck_places = max_waiting // RECHECK_DIVISOR
        self._num_places = self._max_taken = max_running + max_waiting
        self._retry_after_s = retry_after_s
        self._retry_after = RetryAfter(retry_after_s)
        self._requests = Requests([], [], False)
        self._changed = Condition()
        self._num_taken = 0
        self._num_taken_by: Counter[str] = Counter()
        """Places held by each group. Requests without a group are not counted here."""
        self.has_failed = False
        self._refusal: type[ServeError] | None = None

    def require_room(self, group: str = "") -> None:
        """Raises `QueueFull`, `Draining` or `EngineDead` if a request would be refused now."""
        with self._changed:
            num_free = self._max_taken - self._num_taken
            if num_free <= 0 or (
                group and self._num_taken_by[group] >= DYNAMIC_THRESHOLD * num_free
            ):
                raise self._refused()

    def _take(self, group: str, change: int) -> None:
        self._num_taken += change
        if group:
            self._num_taken_by[group] += change
            if not self._num_taken_by[group]:
                del self._num_taken_by[group]

    def places(self) -> Places:
        """Returns the numbers that a proxy needs to refuse requests itself."""
        with self._changed:
            return self._retry_after.places(self._num_places, self._num_recheck_places)

    def take_place(self, group: str = "") -> None:
        """Reserves a place for a list of prompts. Raises the errors of `require_room`."""
        with self._changed:
            self.require_room(group)
            self._take(group, 1)

    def free_place(self, group: str = "") -> None:
        """Frees the place that `take_place` has reserved."""
        with self._changed:
            self._take(group, -1)

    def submit(self, sequence: Sequence, stream: Stream) -> None:
        """Accepts a sequence. Raises the errors of `require_room`.

        A list's item raises only `Draining` or `EngineDead`.
        """
        with self._changed:
            if self._refusal is not None:
                raise self._refused()
            if not sequence.is_list_item:
                self.require_room(sequence.scheduling_class.group)
                self._take(sequence.scheduling_class.group, 1)
            self._requests.accepted.append((sequence, stream))
            self._changed.notify()

    def _refuse_all(self, refusal: type[ServeError]) -> None:
        self._refusal, self._max_taken = refusal, 0

    def _refused(self) -> ServeError:
        if self._refusal is not None:
            return self.refusal()
        return QueueFull(FULL_QUEUE, retry_after_s=self._retry_after.next_s())

    def abort(self, sequence: Sequence) -> None:
        """Asks the engine to end an accepted sequence before its next step."""
        with self._changed:
            self._requests.aborted.append(sequence)
            self._changed.notify()

    def stop(self) -> None:
        """Refuses new requests with `Draining` and asks the engine's thread to end."""
        with self._changed:
            self._refuse_all(self._refusal or Draining)
            self._requests = self._requests._replace(is_stopping=True)
            self._changed.notify()

    def fail(self) -> None:
        """Refuses new requests with `EngineDead`."""
        with self._changed:
            self._refuse_all(EngineDead)
            self.has_failed = True

    def take(self, *, wait: bool) -> Requests:
        """Returns all requests, aborts and the stop signal since the last call. With `wait`, sleeps
        until there is one."""
        with self._changed:
            while wait and self._requests == ([], [], False):
                self._changed.wait()
            requests, self._requests = self._requests, Requests([], [], self._requests.is_stopping)
            return requests

    def finish_one(self, sequence: Sequence) -> None:
        """Frees the place of an ended sequence."""
        with self._changed:
            if not sequence.is_list_item:
                self._take(sequence.scheduling_class.group, -1)
            self._retry_after.ended(is_saturated=self._num_taken >= self._max_running)

    @property
    def num_taken(self) -> int:
        """Number of places that single requests and lists hold."""
        return self._num_taken

    @property
    def num_waiting(self) -> int:
        """Number of accepted requests that the engine's thread has not taken yet."""
        return len(self._requests.accepted)

    def refusal(self) -> ServeError:
        """Returns a new error with the reason why no request is accepted any more."""
        if self._refusal is EngineDead:
            return EngineDead("The engine has failed. Send the request to another server.")
        return Draining(
            "The server is shutting down. Send the request again.",
            retry_after_s=self._retry_after_s,
        )
