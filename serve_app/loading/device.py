"""Which device computes, in which dtype, with how many threads, and whether its memory is enough.

Notes what it chooses where the settings leave it open. Knows no model.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from serve_app.config.settings import Settings
from serve_app.errors import ModelLoadFailed
from serve_app.machine.host import free_bytes

if TYPE_CHECKING:
    import torch


def choose_device(settings: Settings, notes: list[str]) -> "torch.device":
    import torch

    chosen, has_gpu = settings.model.device, torch.cuda.is_available()
    if chosen == "cuda" and not has_gpu:
        raise ModelLoadFailed("`model.device` is cuda, but torch sees no GPU on this machine.")
    if chosen == "auto":
        chosen = "cuda" if has_gpu else "cpu"
        notes.append(f"device {chosen}: torch sees {'a' if has_gpu else 'no'} GPU")
    return torch.device(chosen)


def choose_dtype(settings: Settings, device: "torch.device", notes: list[str]) -> "torch.dtype":
    import torch

    name = settings.model.dtype
    if name == "auto":
        name = "float32" if device.type == "cpu" else "bfloat16"
        notes.append(f"dtype {name}: the default on {device.type}")
    chosen: torch.dtype = getattr(torch, name)
    return chosen


def set_threads(settings: Settings, device: "torch.device", notes: list[str]) -> None:
    import torch

    if device.type != "cpu":
        return
    num_threads = settings.engine.num_threads
    if num_threads is None:
        num_cores = len(os.sched_getaffinity(0))
        num_threads = max(1, num_cores - 1)
        notes.append(f"{num_threads} compute threads: {num_cores} cores, one left to the sockets")
    torch.set_num_threads(num_threads)


@contextmanager
def memory_for(what: str, num_bytes: int, device: "torch.device", remedy: str) -> Iterator[None]:
    """Says in a sentence that the device's memory does not hold `what`, of `num_bytes`."""
    free = free_on(device)
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # torch.OutOfMemoryError on a GPU, a plain RuntimeError on a CPU.
        if "memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        place = "of the GPU's memory" if device.type == "cuda" else "of main memory"
        raise ModelLoadFailed(
            f"There is no memory for {what}: {num_bytes / 1e9:.2f} GB are needed and "
            f"{free / 1e9:.2f} GB {place} were free; {remedy}."
        ) from error


def free_on(device: "torch.device") -> int:
    """Bytes that are free: of the GPU, or of main memory within the container's limit."""
    import torch

    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_bytes()
