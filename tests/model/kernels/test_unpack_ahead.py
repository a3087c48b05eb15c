"""The order of dequantizing and products on two streams that run in any order events allow."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from serve_app.model.kernels.triton.unpack_ahead import Job, UnpackAhead


class Place(NamedTuple):
    """A record of an event: an operation of a stream."""

    stream: str
    number: int


class Event:
    at: Place | None = None
    """What a wait from now on waits for; a wait for nothing returns at once, as CUDA's does."""


class Stream:
    """Keeps what it is given; an operation is something to do, or a place to wait for."""

    def __init__(self, name: str, *, waits: bool) -> None:
        self.name, self._waits = name, waits
        self.operations: list[Callable[[], object] | Place] = []

    def record_event(self, event: Event) -> None:
        event.at = Place(self.name, len(self.operations))
        self.operations.append(lambda: None)

    def wait_event(self, event: Event) -> None:
        if event.at is not None and self._waits:
            self.operations.append(event.at)


class Streams:
    """Two streams and the memory that they share; `without` names one whose waits are left out."""

    def __init__(self, without: str = "") -> None:
        names = ("first", "second")
        self._streams = {name: Stream(name, waits=name != without) for name in names}
        self.second = self._streams["second"]
        self.contents: dict[int, int] = {}
        """What each buffer holds; 0 while it is written."""
        self.filled: list[int] = []
        """The weights that have been dequantized."""
        self.reading = 0
        """The weights that a product reads."""
        self.used: list[Tensor] = []
        self.offset = 0
        """Added to the numbers of the weights of a step."""
        self._current = self.first()

    def first(self) -> Stream:
        return self._streams["first"]

    @contextmanager
    def on_second(self) -> Iterator[None]:
        self._current = self.second
        yield
        self._current = self.first()

    def event(self) -> Event:
        return Event()

    def use(self, memory: Tensor) -> None:
        self.used.append(memory)

    def unpack(self, weight: Any, which: Tensor, out: Tensor) -> None:
        """Launches a kernel on the current stream, which ends some time after it began."""
        at, number = out.data_ptr(), weight.number + self.offset

        def end() -> None:
            self.contents[at] = number
            self.filled.append(number)

        self._current.operations += [lambda: self.contents.update({at: 0}), end]

    def product(self, weights: Tensor, number: int) -> None:
        """Launches a product with the weights of this number."""
        at = weights.data_ptr()
        number += self.offset

        def read(reading: int) -> None:
            self.reading = reading
            assert self.contents.get(at) == number, "a product read other weights than its own"

        self.first().operations += [lambda: read(number), lambda: read(0)]

    def run(self, choose: Callable[[list[str]], str], look: Callable[[], object]) -> None:
        """Runs everything; `choose` picks one of the streams that need not wait."""
        done = dict.fromkeys(self._streams, 0)

        def can_run(name: str) -> bool:
            operations = self._streams[name].operations
            if done[name] == len(operations):
                return False
            next_one = operations[done[name]]
            return not isinstance(next_one, Place) or done[next_one.stream] > next_one.number

        while ready := [name for name in done if can_run(name)]:
            name = choose(ready)
            operation = self._streams[name].operations[done[name]]
            if not isinstance(operation, Place):
                operation()
            done[name] += 1
            look()
        ends = {name: len(stream.operations) for name, stream in self._streams.items()}
        assert done == ends, "streams wait for each other"


def jobs_of(layers: int, groups: int) -> list[Job]:
    """Jobs as `UnpackedProducts` makes them; each weight has a number, 1 and more."""
    names = [*("qkv", "o"), *("gate_up", "down") * groups] * layers
    which = torch.zeros(1, dtype=torch.int64)
    return [
        Job(SimpleNamespace(packed=torch.empty(2, 2), number=i + 1), which, name)  # type: ignore[arg-type]
        for i, name in enumerate(names)
    ]


def launched(groups: int, without: str = "") -> Streams:
    """Runs a step that fails after three products, and one that has all of them."""
    streams, jobs = Streams(without), jobs_of(3, groups)
    ahead = UnpackAhead(streams.unpack, jobs, torch.float32, torch.device("cpu"), streams)
    for count in (3, len(jobs)):
        streams.offset += 100
        ahead.begin()
        for number in range(1, count + 1):
            streams.product(ahead.take(), number)
    return streams


Order = Callable[[list[str]], str]


def orders() -> Iterator[Order]:
    """Yields "the first stream as early as it can", then the second, then mixtures of both."""
    yield from (min, max)
    for seed in range(40):
        yield mixed(random.Random(seed))


def mixed(generator: random.Random) -> Order:
    """Takes the first stream, where both are ready, in a random share of cases."""
    share = generator.random()
    return lambda ready: min(ready) if generator.random() < share else max(ready)


@pytest.mark.parametrize("groups", [1, 4])
def test_every_product_reads_its_own_weights(groups: int) -> None:
    """Whichever stream is faster, and after a step that failed."""
    for order in orders():
        launched(groups).run(order, lambda: None)


@pytest.mark.parametrize("without", ["first", "second"])
def test_a_missing_wait_is_found(without: str) -> None:
    """Without the products' waits for their weights, or the fills' for the products before, some
    order of the streams gives a product other weights."""

    def fails(order: Order) -> bool:
        try:
            launched(1, without).run(order, lambda: None)
        except AssertionError:
            return True
        return False

    assert any(fails(order) for order in orders())


def test_weights_are_ready_three_products_ahead() -> None:
    """A buffer for each product of a layer: while one is computed, the weights of the next three
    are dequantized. The second stream keeps the memory of all buffers."""
    streams, ahead = launched(1), list[int]()

    def look() -> None:
        if streams.reading:
            ahead.append(streams.filled[-1] - streams.reading)

    streams.run(max, look)
    assert max(ahead) == 3
    assert len(streams.used) == 4


def test_on_a_cpu_weights_are_there_when_taken() -> None:
    """Without streams, each product gets its own weights too."""

    def unpack(weight: Any, which: Tensor, out: Tensor) -> None:
        out.fill_(weight.number)

    jobs = jobs_of(2, 2)
    ahead = UnpackAhead(unpack, jobs, torch.float32, torch.device("cpu"), None)
    ahead.begin()
    assert [float(ahead.take().max()) for _ in jobs] == list(range(1, len(jobs) + 1))
