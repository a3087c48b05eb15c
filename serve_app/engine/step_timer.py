"""StepTimer: measures the device time of one step."""

import time
from typing import Any

import torch


class StepTimer:
    """A timer that starts when it is created.

    On a GPU it uses CUDA events on the current stream, so it does not count earlier steps or the
    host's waiting time.
    """

    def __init__(self, device: torch.device) -> None:
        self._events: tuple[Any, Any] | None = None
        if device.type == "cuda":
            event: Any = torch.cuda.Event  # torch has no types for it
            self._events = event(enable_timing=True), event(enable_timing=True)
            self._events[0].record()
        self._began = time.perf_counter()
        self._ended = self._began

    def stop(self) -> None:
        """Marks the end of the step. On a GPU this is the end of the work queued so far."""
        if self._events is not None:
            self._events[1].record()
        self._ended = time.perf_counter()

    def seconds(self) -> float:
        """Waits for the end of the step and returns its seconds. Call `stop` before."""
        if self._events is None:
            return self._ended - self._began
        start, end = self._events
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000
