"""UnpackAhead: dequantizes the weights of a step, each while the product before it runs."""

from collections.abc import Callable, Iterable, Iterator
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from serve_app.model.quantized_weight import QuantizedWeight


class Job(NamedTuple):
    """Matrices that one product takes."""

    weight: QuantizedWeight
    which: Tensor
    """int64 `[n]`, on the device: numbers of a stack's matrices; `[0]` for one matrix."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """`[n, N, K]`"""
        out_features, half = self.weight.packed.shape[-2:]
        return len(self.which), out_features, 2 * half


Unpack = Callable[[QuantizedWeight, Tensor, Tensor], object]
"""Dequantizes matrices `which` of a weight into the last argument, `[n, N, K]`."""


class UnpackAhead:
    """Two buffers, by turns: while a product reads one, a second stream fills the other.

    The second stream has a higher priority: as programs of the running product end, some of its own
    take their place, so the memory is busy while the product computes. On a CPU everything happens
    in order.
    """

    def __init__(self, unpack: Unpack, dtype: torch.dtype, device: torch.device) -> None:
        self._unpack, self._dtype, self._device = unpack, dtype, device
        self._jobs: Iterator[Job] = iter(())
        self._buffers: list[Tensor] = []
        self._filled: Tensor | None = None
        self._turn = 0
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            cuda: Any = torch.cuda
            self._stream = cuda.Stream(device, priority=-1)
            self._is_filled, self._is_free = cuda.Event(), cuda.Event()

    def begin(self, jobs: Iterable[Job]) -> None:
        """Starts a step whose products take the weights of `jobs`, in this order."""
        every = list(jobs)
        if self._stream is not None:  # a step that failed may have left a buffer half filled
            torch.cuda.current_stream(self._device).wait_event(self._is_filled)
        sizes = [max((prod(job.shape) for job in every[turn::2]), default=0) for turn in (0, 1)]
        # The memory is the main stream's: it is given back when the step's products are queued.
        self._buffers = [
            torch.empty(size, dtype=self._dtype, device=self._device) for size in sizes
        ]
        self._jobs, self._turn = iter(every), 0
        self._fill()

    def take(self) -> Tensor:
        """The next job's weights `[n, N, K]`, until the next call; starts the job after it."""
        assert self._filled is not None, "a product without a job"
        weights = self._filled
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_event(self._is_filled)
        self._fill()
        return weights

    def _fill(self) -> None:
        """Fills the next buffer once the work queued so far, which may read it, is done."""
        job = next(self._jobs, None)
        if job is None:
            self._filled, self._buffers = None, []
            return
        self._filled = self._buffers[self._turn][: prod(job.shape)].view(job.shape)
        self._turn = 1 - self._turn
        if self._stream is None:
            self._unpack(*job, self._filled)
            return
        self._is_free.record()
        self._stream.wait_event(self._is_free)
        with torch.cuda.stream(self._stream):
            self._unpack(*job, self._filled)
            self._is_filled.record()
