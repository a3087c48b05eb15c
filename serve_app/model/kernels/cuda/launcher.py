"""Loads compiled kernels into the current CUDA context and launches them on torch's stream."""

from collections.abc import Sequence
from ctypes import c_int, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class DriverError(Exception):
    """A call of the CUDA driver failed; the message names the call and the error."""


def cuda_driver() -> Any:
    """Returns the module with the CUDA driver's functions; importing it needs no GPU."""
    from cuda.bindings import driver

    return driver


def unwrap(call: str, result: Sequence[Any]) -> Any:
    """Returns the value in `result`, the tuple (error, value, ...) of a driver call.

    Raises a `DriverError` that names `call` if the call failed.
    """
    error, *values = result
    if int(error):
        raise DriverError(f"{call} failed: {error}")
    return values[0] if len(values) == 1 else values


@dataclass(frozen=True)
class Grid:
    """The shape of a launch."""

    blocks: int
    threads: int
    """Number of threads of each block."""
    shared_bytes: int
    """Bytes of shared memory of each block."""
    overlaps: bool = False
    """Whether the kernel may start before the previous kernel has ended (programmatic dependent
    launch); intrinsics.cuh has the rule for such kernels."""


class Kernel:
    """One compiled kernel on the current device."""

    def __init__(self, cubin: bytes, name: str, grid: Grid, driver: Any = None) -> None:
        """`driver` replaces `cuda_driver()` in tests. Raises `DriverError`."""
        self._driver = cuda_driver() if driver is None else driver
        self._grid = grid
        # The function lives as long as its module.
        self._module = unwrap("cuModuleLoadData", self._driver.cuModuleLoadData(cubin))
        result = self._driver.cuModuleGetFunction(self._module, name.encode())
        self._function = unwrap("cuModuleGetFunction", result)
        attribute = self._driver.CUfunction_attribute
        limit = attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        result = self._driver.cuFuncSetAttribute(self._function, limit, grid.shared_bytes)
        unwrap("cuFuncSetAttribute", result)
        self._attributes = [overlapping(self._driver)] if grid.overlaps else []

    def launch(self, *arguments: Tensor | int | None, blocks: int | None = None) -> None:
        """Launches the kernel on torch's current stream. Raises `DriverError`.

        A tensor is passed as its address, None as a null pointer. `blocks` replaces the grid's
        number of blocks. The memory of the tensors must not be reused before the kernel has run;
        torch's allocator guarantees this for tensors that were allocated on the same stream.
        """
        values = tuple(map(value_of, arguments))
        types = tuple(c_int if isinstance(argument, int) else c_void_p for argument in arguments)
        config, grid = self._driver.CUlaunchConfig(), self._grid
        config.gridDimX, config.gridDimY, config.gridDimZ = blocks or grid.blocks, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = grid.threads, 1, 1
        config.sharedMemBytes, config.hStream = grid.shared_bytes, current_stream()
        config.attrs, config.numAttrs = self._attributes, len(self._attributes)
        result = self._driver.cuLaunchKernelEx(config, self._function, (values, types), 0)
        unwrap("cuLaunchKernelEx", result)


def overlapping(driver: Any) -> Any:
    """Returns the launch attribute for a kernel that may start before the previous one has ended.

    A captured graph keeps the attribute.
    """
    attribute = driver.CUlaunchAttribute()
    names = driver.CUlaunchAttributeID
    attribute.id = names.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    return attribute


def value_of(argument: Tensor | int | None) -> int:
    """Returns the number that the driver gets for an argument."""
    if argument is None:
        return 0
    return argument if isinstance(argument, int) else argument.data_ptr()


def current_stream() -> int:
    """Returns the handle of torch's current stream.

    `torch.cuda.current_stream` took an eighth of the time in which the host launches a prompt's
    step. Triton uses this function too.
    """
    get: Any = torch._C._cuda_getCurrentRawStream
    return int(get(torch.cuda.current_device()))
