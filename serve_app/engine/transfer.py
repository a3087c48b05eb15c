"""Copies between host and device that do not wait for the device."""

import numpy as np
import torch
from torch import Tensor


def to_device(values: list[int], device: torch.device) -> Tensor:
    """int64 `values` `[n]` on `device`, copied without waiting for work queued there."""
    # Through numpy: it reads a list five times as fast as torch.
    tensor = torch.from_numpy(np.array(values, dtype=np.int64))
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def tensor_to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host's `tensor` on `device`, copied without waiting; `tensor` may be changed afterwards.

    On a CPU it is `tensor` itself.
    """
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """A copy of `tensor` on the host.

    A copy from a GPU is complete once the work queued there is done; until then its values are
    undefined. Record a CUDA event after this call and wait for it.
    """
    if not tensor.is_cuda:
        return tensor.clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
