"""UnpackAhead: dequantizes the weights of a step on a second stream, ahead of the products."""

from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from math import prod
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from serve_app.model.quantized_weight import QuantizedWeight


class Job(NamedTuple):
    """The matrices of one product, which are dequantized together."""

    weight: QuantizedWeight
    indices: Tensor
    """int64 `[n]` on the device: indices of the matrices in a stack; `[0]` for a single matrix."""
    buffer: str
    """The name of the buffer for the dequantized weights. Jobs with the same buffer take turns."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """`[n, N, K]`"""
        out_features, half = self.weight.packed.shape[-2:]
        return len(self.indices), out_features, 2 * half


Unpack = Callable[[QuantizedWeight, Tensor, Tensor], object]
"""A function `unpack(weight, indices, out)` that dequantizes matrices of `weight` into `out`
`[n, N, K]`."""


class Stream(Protocol):
    """The methods of `torch.cuda.Stream` that are used here."""

    def record_event(self, event: Any) -> object: ...
    def wait_event(self, event: Any) -> object: ...


class Streams(Protocol):
    """The stream that computes a step's products, and a second one that dequantizes."""

    @property
    def second(self) -> Stream: ...
    def first(self) -> Stream: ...
    def on_second(self) -> AbstractContextManager[object]:
        """Returns a context in which kernels are launched on the second stream."""
        ...

    def event(self) -> Any: ...
    def use(self, memory: Tensor) -> None:
        """Prevents torch from reusing freed `memory` until the second stream has used it."""
        ...


class CudaStreams:
    """torch's current stream on a GPU, and one with a higher priority. When a block of a product
    ends, a block of the second stream's kernel starts in its place."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        make: Any = torch.cuda.Stream  # which has no types
        self.second: Stream = make(device, priority=-1)

    def first(self) -> Stream:
        """See `Streams`."""
        return torch.cuda.current_stream(self._device)

    def on_second(self) -> AbstractContextManager[object]:
        """See `Streams`."""
        second: Any = self.second
        return torch.cuda.stream(second)

    def event(self) -> Any:
        """See `Streams`."""
        make: Any = torch.cuda.Event  # which has no types
        return make()

    def use(self, memory: Tensor) -> None:
        """See `Streams`."""
        second: Any = self.second
        memory.record_stream(second)


class Buffer:
    """Memory for the weights of one product at a time. The event `is_filled` marks the end of the
    dequantizing, `is_free` the end of the product that reads the weights."""

    def __init__(self, memory: Tensor, streams: Streams | None) -> None:
        self.memory = memory
        if streams is not None:
            streams.use(memory)
            self.is_filled, self.is_free = streams.event(), streams.event()


class UnpackAhead:
    """Dequantizes the weights of a step's products in their order, into one buffer per name.

    A buffer is filled again as soon as the product that reads it has ended. Example with the
    buffers qkv, o, gate_up and down: `begin` fills all four for layer 0. When the product o of
    layer 0 takes its weights, the product qkv has been launched, so the buffer qkv is filled for
    layer 1 while o, gate_up and down of layer 0 are computed. Without `streams` (on a CPU),
    everything happens in order.
    """

    def __init__(
        self,
        unpack: Unpack,
        jobs: Iterable[Job],
        dtype: torch.dtype,
        device: torch.device,
        streams: Streams | None,
    ) -> None:
        """`jobs` are the jobs of each step. The buffers are allocated once, here."""
        self._unpack, self._streams, self._every = unpack, streams, list(jobs)
        sizes: dict[str, int] = {}
        for job in self._every:
            sizes[job.buffer] = max(sizes.get(job.buffer, 0), prod(job.shape))
        self._buffers = {
            name: Buffer(torch.empty(size, dtype=dtype, device=device), streams)
            for name, size in sizes.items()
        }
        self._waiting: deque[Job] = deque()
        """Jobs whose buffer is not free."""
        self._filled: deque[tuple[str, Tensor]] = deque()
        """Buffers that are filled or being filled, in the order of the products."""
        self._reading: str | None = None
        """The buffer whose weights the last `take` returned."""

    def begin(self) -> None:
        """Starts a step, and begins to fill each buffer. The last step may have failed midway.

        The buffers are filled after the work that is already launched on the first stream.
        """
        self._waiting, self._reading = deque(self._every), None
        self._filled.clear()
        for name in self._buffers:
            self._free(name)
        self._fill()

    def take(self) -> Tensor:
        """Returns the weights of the next job, `[n, N, K]`, which are valid until the next call.

        The product that reads them must be launched on the first stream before the next call.
        """
        if self._reading is not None:
            self._free(self._reading)
        self._reading, weights = self._filled.popleft()
        if self._streams is not None:
            self._streams.first().wait_event(self._buffers[self._reading].is_filled)
        self._fill()
        return weights

    def _free(self, name: str) -> None:
        """Allows the buffer to be filled after the work launched on the first stream so far."""
        if self._streams is not None:
            self._streams.first().record_event(self._buffers[name].is_free)

    def _fill(self) -> None:
        """Dequantizes the waiting jobs in order, up to the first one whose buffer is in use."""
        while self._waiting and not self._is_used(self._waiting[0].buffer):
            job = self._waiting.popleft()
            buffer = self._buffers[job.buffer]
            weights = buffer.memory[: prod(job.shape)].view(job.shape)
            self._filled.append((job.buffer, weights))
            if self._streams is None:
                self._unpack(job.weight, job.indices, weights)
                continue
            self._streams.second.wait_event(buffer.is_free)
            with self._streams.on_second():
                self._unpack(job.weight, job.indices, weights)
            self._streams.second.record_event(buffer.is_filled)

    def _is_used(self, name: str) -> bool:
        return name == self._reading or any(name == filled for filled, _ in self._filled)
