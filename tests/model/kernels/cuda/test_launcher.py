"""The launcher, with a driver that writes down its calls in place of CUDA's."""

from collections.abc import Sequence
from ctypes import c_int, c_void_p, sizeof
from dataclasses import replace
from typing import Any

import pytest
import torch

from serve_app.model.kernels.cuda import launcher
from serve_app.model.kernels.cuda.compiler import SOURCES
from serve_app.model.kernels.cuda.launcher import DriverError, Grid, Kernel
from serve_app.model.kernels.cuda.products import TiledWeight
from serve_app.model.kernels.cuda.sampling import SampleKernel
from serve_app.model.kernels.cuda.step_kernels import AttentionMemory, Routing, StepKernels
from serve_app.model.kernels.cuda.use_kernels import products_of
from serve_app.model.kernels.cuda.variants import CAPABILITIES, Card
from serve_app.model.kernels.decode_batch import DecodeBatch
from serve_app.model.kernels.unavailable import StepUnavailable
from serve_app.model.quantize import code_values
from tests.model.kernels.compiled import parameter_sizes
from tests.model.kernels.cuda.emulator import CachedCompiler
from tools.random_model import config_of

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


class Recorded(Kernel):
    """A kernel with the sizes of its parameters, of a driver that writes down the launches."""

    def __init__(self, cubin: bytes, name: str, grid: Grid, driver: FakeDriver) -> None:
        super().__init__(cubin, name, grid, driver)
        self.name, self.sizes = name, parameter_sizes(cubin)
        self._calls, self.launches = driver.calls, list[list[int]]()

    def launch(self, *arguments: Any, blocks: int | None = None) -> None:
        super().launch(*arguments, blocks=blocks)
        _, types = self._calls[-1][3]
        self.launches.append([sizeof(each) for each in types])


def launch_each(card: Card, make: Any) -> None:
    """Launches every kernel at Mixtral's sizes, on tensors that nobody reads."""
    config, x = config_of(tiny=False, layers=1), torch.zeros(1)
    hidden, inner, top_k = config.hidden_size, config.intermediate_size, 2
    products = products_of(config, card, code_values("nf4"), make)

    def weight(experts: int, rows: int, columns: int) -> TiledWeight:
        return TiledWeight(x.expand(experts, rows, columns // 2), x)

    for tokens in (1, 12, 24, 48, 100, 200):
        one, entries = x.expand(tokens, hidden), x.expand(tokens * top_k, inner)
        for rows in (hidden, hidden + 2 * config.kv_size):
            products.dense(weight(1, rows, hidden), one, x)
        products.gate_up(weight(8, 2 * inner, hidden), one, x, x, x)
        products.down(weight(8, hidden, inner), entries, x, x, x, top_k, x)
    products.unpack_into(weight(8, hidden, inner), x, x)

    step, finished = StepKernels(config, card, make), torch.zeros(1, dtype=torch.int32)
    batch = DecodeBatch(x, x, x, x, torch.zeros(1, 1))
    routing, memory = Routing.empty(1, config, finished), AttentionMemory(config, 1, x.device)
    step.embed(x, x, x, x, x)
    step.add_norm(x, x, x, x, x)
    step.add_norm_route(x, x, x, x, x, x, routing)
    step.rope(x, batch, (x, x), x, x, x)
    step.attention(x, torch.zeros(1, 16, 8, 128), x, batch, memory, x)

    sampler = SampleKernel(32_000, 1, card, x.device, make)
    logits = torch.zeros(1, 32_000)
    for masks in (None, x):
        sampler.launch(logits, x, x, masks, x)


@pytest.mark.parametrize("capability", [80, 90])
def test_arguments_have_the_sizes_of_parameters(
    capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every launch of every kernel passes as many bytes for each argument as the machine code
    takes. The driver copies that many from where the binding has put the argument, and checks
    nothing."""
    try:
        compiler = CachedCompiler(capability)
    except StepUnavailable as reason:
        pytest.skip(str(reason))
    monkeypatch.setattr(launcher, "current_stream", lambda: 0)
    made: list[Recorded] = []

    def make(name: str, macros: Sequence[str], grid: Grid) -> Recorded:
        made.append(Recorded(compiler.cubin(name, macros), name, grid, FakeDriver()))
        return made[-1]

    launch_each(Card(capability, 132), make)
    assert {kernel.name for kernel in made} == {path.stem for path in SOURCES.glob("*.cu")}
    for kernel in made:
        assert kernel.launches, kernel.name
        assert all(sizes == kernel.sizes for sizes in kernel.launches), kernel.name


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_overlap_where_the_card_can_do_that(capability: int) -> None:
    """Compute capability 9.0 and newer: every kernel that waits for the one before it. On older
    cards none has the launch attribute, which CUDA documents for 9.0 and newer only."""
    overlaps: dict[str, set[bool]] = {}

    class Noted:
        def __init__(self, name: str, macros: Sequence[str], grid: Grid) -> None:
            overlaps.setdefault(name, set()).add(grid.overlaps)

        def launch(self, *arguments: object, blocks: int | None = None) -> None: ...

    launch_each(Card(capability, 132), Noted)
    assert overlaps.pop("unpack") == {False}
    assert len(overlaps) == 6
    assert all(each == {capability >= 90} for each in overlaps.values()), overlaps
