"""RequestQueue: brings new, aborted and stop requests from any thread to the engine's thread."""

from collections import Counter
from threading import Condition
from typing import NamedTuple

from serve_app.engine.retry_after import Places, RetryAfter
from serve_app.engine.sequence import Sequence
from serve_app.engine.stream import Stream
from serve_app.errors import Draining, EngineDead, QueueFull, ServeError

MAX_TO_FREE = 2
"""A group may take this many times the places that are left free. So one group alone gets two
thirds of the places, two get two fifths each, and there is always room for another group (dynamic
thresholds: Choudhury and Hahne, IEEE/ACM Transactions on Networking 6, 1998)."""
FREE_UNASKED = 32
"""A proxy may leave one of so many waiting places free before it asks."""


class Requests(NamedTuple):
    """Everything that has arrived since the last `take`."""

    accepted: list[tuple[Sequence, Stream]]
    aborted: list[Sequence]
    is_stopping: bool


class RequestQueue:
    """Accepts requests while fewer places are taken than `max_running` + `max_waiting`.

    A single request takes a place until its sequence ends, and a list of prompts takes one until
    all its items have ended. The items themselves take none and are never refused: the list limits
    how many of them there are at once.
    """

    def __init__(self, max_running: int, max_waiting: int, retry_after_s: int) -> None:
        """`retry_after_s` is the shortest `Retry-After`, in seconds."""
        self._max_running = max_running
        self._num_unasked = max_waiting // FREE_UNASKED
        self._num_places = self._max_taken = max_running + max_waiting
        self._retry_after_s = retry_after_s
        self._retry_after = RetryAfter(retry_after_s)
        self._requests = Requests([], [], False)
        self._changed = Condition()
        self._num_taken = 0
        self._num_taken_by: Counter[str] = Counter()
        """By group, without the requests that have none."""
        self.has_failed = False
        self._refusal: type[ServeError] | None = None

    def require_room(self, group: str = "") -> None:
        """Raises `QueueFull`, `Draining` or `EngineDead` where a request would be refused now."""
        with self._changed:
            num_free = self._max_taken - self._num_taken
            if num_free <= 0 or (group and self._num_taken_by[group] >= MAX_TO_FREE * num_free):
                raise self._refused()

    def _take(self, group: str, change: int) -> None:
        self._num_taken += change
        if group:
            self._num_taken_by[group] += change
            if not self._num_taken_by[group]:
                del self._num_taken_by[group]

    def places(self) -> Places:
        """What a proxy needs to refuse requests by itself."""
        with self._changed:
            return self._retry_after.places(self._num_places, self._num_unasked)

    def take_place(self, group: str = "") -> None:
        """Takes a place for a list of prompts; raises as `require_room`."""
        with self._changed:
            self.require_room(group)
            self._take(group, 1)

    def free_place(self, group: str = "") -> None:
        """Ends what `take_place` began."""
        with self._changed:
            self._take(group, -1)

    def submit(self, sequence: Sequence, stream: Stream) -> None:
        """Accepts a sequence; raises as `require_room`, for a list's item only when stopped."""
        with self._changed:
            if self._refusal is not None:
                raise self._refused()
            if not sequence.is_list_item:
                self.require_room(sequence.turn.group)
                self._take(sequence.turn.group, 1)
            self._requests.accepted.append((sequence, stream))
            self._changed.notify()

    def _refuse_all(self, refusal: type[ServeError]) -> None:
        self._refusal, self._max_taken = refusal, 0

    def _refused(self) -> ServeError:
        if self._refusal is not None:
            return self.refusal()
        return QueueFull(
            "Too many requests are waiting; send this one again after the seconds in the header "
            "Retry-After.",
            retry_after_s=self._retry_after.next_s(),
        )

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
        """Removes and returns all requests; with `wait`, sleeps until there is one."""
        with self._changed:
            while wait and self._requests == ([], [], False):
                self._changed.wait()
            taken, self._requests = self._requests, Requests([], [], self._requests.is_stopping)
            return taken

    def finish_one(self, sequence: Sequence) -> None:
        """Counts `sequence` as ended, which makes room for another."""
        with self._changed:
            if not sequence.is_list_item:
                self._take(sequence.turn.group, -1)
            self._retry_after.ended(is_saturated=self._num_taken >= self._max_running)

    @property
    def num_taken(self) -> int:
        """Places taken by single requests and by lists."""
        return self._num_taken

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
