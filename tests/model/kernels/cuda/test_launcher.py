"""The launcher, with a driver that writes down its calls in place of CUDA's."""

from ctypes import c_int, c_void_p
from dataclasses import replace
from typing import Any

import pytest
import torch

from serve_app.model.kernels.cuda import launcher
from serve_app.model.kernels.cuda.launcher import DriverError, Grid, Kernel

real = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
OK = real.CUresult.CUDA_SUCCESS
GRID = Grid(blocks=264, threads=256, shared_bytes=80 << 10)


class FakeDriver:
    """The driver's calls, with the real library's types of arguments and results."""

    CUlaunchConfig = real.CUlaunchConfig
    CUfunction_attribute = real.CUfunction_attribute
    CUlaunchAttribute = real.CUlaunchAttribute
    CUlaunchAttributeID = real.CUlaunchAttributeID

    def __init__(self, failing: str = "") -> None:
        self.failing, self.calls = failing, list[tuple[Any, ...]]()

    def _result(self, name: str, *values: Any) -> tuple[Any, ...]:
        error = real.CUresult.CUDA_ERROR_INVALID_VALUE if name == self.failing else OK
        return (error, *values)

    def cuModuleLoadData(self, cubin: bytes) -> tuple[Any, ...]:
        self.calls.append(("load", cubin))
        return self._result("cuModuleLoadData", real.CUmodule(5))

    def cuModuleGetFunction(self, module: Any, name: bytes) -> tuple[Any, ...]:
        self.calls.append(("function", int(module), name))
        return self._result("cuModuleGetFunction", real.CUfunction(7))

    def cuFuncSetAttribute(self, function: Any, attribute: Any, value: int) -> tuple[Any, ...]:
        self.calls.append(("attribute", int(function), attribute.name, value))
        return self._result("cuFuncSetAttribute")

    def cuLaunchKernelEx(
        self, config: Any, function: Any, arguments: Any, extra: int
    ) -> tuple[Any, ...]:
        grid = (config.gridDimX, config.gridDimY, config.gridDimZ)
        block = (config.blockDimX, config.blockDimY, config.blockDimZ)
        how = (grid, block, config.sharedMemBytes, int(config.hStream))
        self.attributes = [
            (each.id.name, each.value.programmaticStreamSerializationAllowed)
            for each in config.attrs[: config.numAttrs]
        ]
        self.calls.append(("launch", int(function), how, arguments, extra))
        return self._result("cuLaunchKernelEx")


def test_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared memory beyond 48 KB is asked for; tensors are addresses, None is null, on torch's
    stream."""
    driver = FakeDriver()
    kernel = Kernel(b"cubin", "few_tokens", GRID, driver)
    limit = "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES"
    assert driver.calls == [
        ("load", b"cubin"),
        ("function", 5, b"few_tokens"),
        ("attribute", 7, limit, 80 << 10),
    ]
    monkeypatch.setattr(launcher, "current_stream", lambda: 11)
    x = torch.zeros(3)
    kernel.launch(x, None, 42)
    arguments = ((x.data_ptr(), 0, 42), (c_void_p, c_void_p, c_int))
    assert driver.calls[3:] == [
        ("launch", 7, ((264, 1, 1), (256, 1, 1), 80 << 10, 11), arguments, 0)
    ]
    assert driver.attributes == []


def test_a_kernel_may_overlap_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launch has CUDA's attribute for it where the grid says so, and as many blocks as it is
    asked for."""
    driver = FakeDriver()
    monkeypatch.setattr(launcher, "current_stream", lambda: 11)
    Kernel(b"", "norm", replace(GRID, overlaps=True), driver).launch(1, blocks=3)
    name = "CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION"
    assert driver.attributes == [(name, 1)]
    assert driver.calls[-1][2][0] == (3, 1, 1)


@pytest.mark.parametrize(
    "call", ["cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute", "cuLaunchKernelEx"]
)
def test_a_failed_call_is_named(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message has the call and CUDA's name of the error."""
    monkeypatch.setattr(launcher, "current_stream", lambda: 0)
    with pytest.raises(DriverError, match=f"{call} failed.*CUDA_ERROR_INVALID_VALUE"):
        Kernel(b"", "unpack", GRID, FakeDriver(call)).launch(1)
