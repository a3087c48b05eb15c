"""Device: times work on a GPU or CPU, and measures how fast it reads."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

ASLEEP = 1_000_000
"""Cycles, half a millisecond: longer than the launch of a graph takes."""
LONG_ASLEEP = 20_000_000
"""Cycles, 10 ms: longer than the launches of a step's sampling take."""
READ_WORDS = 16384
"""Words that a program of the kernel which only reads takes: 64 KB."""
LARGE_GPU_BYTES = 40 * 10**9
BATCHED_TOKENS = {"large GPU": 8192, "GPU": 2048, "CPU": 512}
SMALL_EXPERTS_AT_ONCE = 2
"""The defaults of `serve_app/start_plan/memory.py`, which needs more packages than this."""


def events() -> tuple[Any, Any]:
    """Returns two CUDA events that measure the time between them."""
    make: Any = torch.cuda.Event  # which has no types
    return make(enable_timing=True), make(enable_timing=True)


class Device:
    """One device and its clock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_cuda = device.type == "cuda"

    def describe(self) -> dict[str, Any]:
        """Returns `{"device", "device_gb"}`."""
        if not self.is_cuda:
            return {"device": "cpu", "device_gb": None}
        properties = torch.cuda.get_device_properties(self.device)
        return {
            "device": properties.name,
            "device_gb": round(properties.total_memory / 1e9, 1),
            "multiprocessors": properties.multi_processor_count,
            "capability": ".".join(map(str, torch.cuda.get_device_capability(self.device))),
        }

    def free_bytes(self) -> int:
        """Returns the free bytes of a GPU; 0 on a CPU."""
        return torch.cuda.mem_get_info(self.device)[0] if self.is_cuda else 0

    def batched_tokens(self) -> int:
        """Returns the tokens of one step of a server on this device, by default."""
        if not self.is_cuda:
            return BATCHED_TOKENS["CPU"]
        is_large = torch.cuda.mem_get_info(self.device)[1] >= LARGE_GPU_BYTES
        return BATCHED_TOKENS["large GPU" if is_large else "GPU"]

    def experts_at_once(self, num_experts: int) -> int:
        """Returns the number of experts that a server on this device holds as floats at a time."""
        if self.is_cuda and torch.cuda.mem_get_info(self.device)[1] >= LARGE_GPU_BYTES:
            return num_experts
        return min(SMALL_EXPERTS_AT_ONCE, num_experts)

    def wait(self) -> None:
        """Waits until all queued work is done."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object], repeats: int = 5) -> float:
        """Returns the median time of `work` from an idle device to an idle device, after one run to
        warm up."""
        times = []
        for _ in range(repeats + 1):
            self.wait()
            began = time.perf_counter()
            work()
            self.wait()
            times.append(time.perf_counter() - began)
        return statistics.median(times[1:])

    def device_seconds(self, work: Callable[[], object], repeats: int = 10) -> float:
        """Returns the median time of `work` on the device alone, replayed as a CUDA graph.

        The device sleeps until the host has launched the graph, so the host's time is not measured.
        `work` must not wait for the device.
        """
        if not self.is_cuda:
            return self.seconds(work, repeats=1)
        work()  # what compiles must not do so in a capture
        self.wait()
        graph = torch.cuda.CUDAGraph()
        # What fails in a capture leaves another stream behind.
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
            work()
        times = []
        for _ in range(repeats + 1):
            begin, end = events()
            torch.cuda._sleep(ASLEEP)  # type: ignore[no-untyped-call]
            begin.record()
            graph.replay()
            end.record()
            self.wait()
            times.append(float(begin.elapsed_time(end)) / 1e3)
        return statistics.median(times[1:])

    def queued_seconds(self, work: Callable[[], object], repeats: int = 10) -> tuple[float, float]:
        """Returns the median times of `work` on the device alone and of the host that launches it.

        The device sleeps for 10 ms while the host launches. `work` may copy to and from the host,
        which a graph may not, and must not wait for the device.
        """
        if not self.is_cuda:
            return (self.seconds(work, repeats=1),) * 2
        work()
        device_times, host_times = [], []
        for _ in range(repeats + 1):
            begin, end = events()
            self.wait()
            torch.cuda._sleep(LONG_ASLEEP)  # type: ignore[no-untyped-call]
            began = time.perf_counter()
            begin.record()
            work()
            end.record()
            host_times.append(time.perf_counter() - began)
            self.wait()
            device_times.append(float(begin.elapsed_time(end)) / 1e3)
        return statistics.median(device_times[1:]), statistics.median(host_times[1:])

    def product_flops(self, dtype: torch.dtype) -> float:
        """Returns the operations per second of a large matrix product of random numbers."""
        size = 8192 if self.is_cuda else 256
        a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
        return 2.0 * size**3 / self.device_seconds(lambda: a @ b)

    def read_bandwidth(self) -> float:
        """Returns the bytes per second of a kernel that only reads a tensor far larger than any
        cache: the ceiling of other kernels. Copies in a CUDA graph reach 60 % of it on an H200."""
        size = 2 << 30 if self.is_cuda else 64 << 20
        source = torch.empty(size // 4, dtype=torch.int32, device=self.device)
        source.view(torch.int64).random_()
        if not self.is_cuda:
            return size / self.device_seconds(source.max)
        from benchmarks.read_kernel import read

        sums = source.new_empty(size // 4 // READ_WORDS)
        return size / self.device_seconds(lambda: read(source, sums))
