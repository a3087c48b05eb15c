"""Prepares the device of a `StartPlan`, and raises a clear error if its memory is too small."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from serve_app.errors import ModelLoadFailed
from serve_app.machine.host import free_bytes, num_cores
from serve_app.start_plan.plan import StartPlan

if TYPE_CHECKING:
    import torch


def set_allocator() -> None:
    """Makes torch's allocator grow its segments on a GPU, so that steps of many sizes leave no
    holes. Variables of the user go before it: `PYTORCH_ALLOC_CONF`, and `PYTORCH_CUDA_ALLOC_CONF`,
    which torch prefers. Call it before torch is imported.
    """
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def open_device(plan: StartPlan) -> "torch.device":
    """Returns the planned device. Raises `ModelLoadFailed` if it is a GPU and torch finds none."""
    import torch

    if plan.device == "cuda" and not torch.cuda.is_available():
        raise ModelLoadFailed(
            f"`model.device` is {plan.asked_device}, but torch finds no GPU on this machine; set "
            "`model.device` to cpu to run without one."
        )
    return torch.device(plan.device)


def set_threads(num_threads: int | None) -> list[str]:
    """Sets the number of torch's threads on a CPU; None leaves one core for network I/O.

    Returns notes for users: one if the number was chosen here. Compiled steps have their own
    threads (`step_threads.py`).
    """
    import torch

    notes = []
    if num_threads is None:
        cores = num_cores()
        num_threads = max(1, cores - 1)
        notes = [f"torch uses {num_threads} of {cores} cores; one is left for network I/O"]
    torch.set_num_threads(num_threads)
    return notes


@contextmanager
def explained_lack_of_memory(
    purpose: str, num_bytes: int, device: "torch.device", remedy: str
) -> Iterator[None]:
    """Raises `ModelLoadFailed` if the `with` block fails for lack of memory.

    The error says that `num_bytes` bytes are needed for `purpose`, and ends with the advice
    `remedy`.
    """
    import torch

    free = free_device_bytes(device)
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # On a CPU torch raises a plain RuntimeError, so the sizes decide.
        is_short = isinstance(error, torch.OutOfMemoryError | MemoryError) or num_bytes > free
        if not is_short:
            raise
        place = "of the GPU's memory" if device.type == "cuda" else "of main memory"
        raise ModelLoadFailed(
            f"There is not enough memory for {purpose}: {num_bytes / 1e9:.2f} GB are needed, but "
            f"only {free / 1e9:.2f} GB {place} were free; {remedy}."
        ) from error


def free_device_bytes(device: "torch.device") -> int:
    """Returns the free bytes of the GPU, or of main memory within the container's limit."""
    import torch

    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_bytes()
