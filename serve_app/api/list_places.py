"""ListPlaces: limits the number of list items in the engine, and distributes them between lists."""

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serve_app.engine.engine import Engine

ItemPlace = Callable[[], AbstractAsyncContextManager[None]]
"""A context manager that waits for the place of one list item, and frees the place at its end."""

MIN_SHARE = 0.25
"""Minimum share of the running sequences that lists may use beside single requests."""


class ListPlaces:
    """Limits the running items of admitted lists, so that single requests are not slowed down.

    If there are only lists, they may fill the engine's batch. Beside single requests, all lists
    together get as many places as there are single requests, or `MIN_SHARE` of the batch if that is
    more. Example with a batch of 32: beside 10 single requests the lists have 10 places, beside 2
    they have 8. A free place is given to the list that has waited longest. An object belongs to one
    event loop.
    """

    def __init__(self, engine: "Engine", max_num_seqs: int) -> None:
        self._engine = engine
        self._max_num_seqs = max_num_seqs
        self._num_lists = 0
        self._num_running = 0
        self._waiting: OrderedDict[int, deque[asyncio.Future[None]]] = OrderedDict()
        self._next_list = 0

    @property
    def num_waiting(self) -> int:
        """Number of items of admitted lists that wait for a place."""
        return sum(len(items) for items in list(self._waiting.values()))

    @asynccontextmanager
    async def admitted(self, group: str = "") -> AsyncGenerator[ItemPlace, None]:
        """Admits one list until the end of the `with` block. Yields the place of each item.

        The whole list takes one place of the engine's queue, in `group`. Raises `QueueFull`,
        `Draining` or `EngineDead` if the list is refused.
        """
        self._engine.take_place(group)
        number, self._next_list = self._next_list, self._next_list + 1
        self._num_lists += 1
        try:
            yield lambda: self._place(number)
        finally:
            self._num_lists -= 1
            self._engine.free_place(group)

    @asynccontextmanager
    async def _place(self, number: int) -> AsyncGenerator[None, None]:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(number, deque()).append(turn)
        self._grant()
        try:
            await turn
            yield
        finally:
            if turn.done() and not turn.cancelled():
                self._num_running -= 1
            else:
                self._forget(number, turn)
            self._grant()

    def _grant(self) -> None:
        """Gives the free places to the lists in round-robin order."""
        while self._waiting and self._num_running < self._max_running():
            number, items = next(iter(self._waiting.items()))
            turn = items.popleft()
            if items:
                self._waiting.move_to_end(number)
            else:
                del self._waiting[number]
            if not turn.done():  # a cancelled item is removed by its own task a moment later
                self._num_running += 1
                turn.set_result(None)

    def _max_running(self) -> int:
        """Number of places that all lists together may use now."""
        num_single = self._engine.num_taken - self._num_lists
        if num_single == 0:
            return self._max_num_seqs
        min_places = max(int(self._max_num_seqs * MIN_SHARE), 1)
        return min(max(num_single, min_places), self._max_num_seqs)

    def _forget(self, number: int, turn: asyncio.Future[None]) -> None:
        items = self._waiting.get(number)
        if items is not None and turn in items:
            items.remove(turn)
            if not items:
                del self._waiting[number]
