"""The CUDA kernels, compiled for cards that are not here: registers, memory and instructions."""

import re

import pytest

from benchmarks.product_loops import listing, loops
from serve_app.model.kernels.cuda.compiler import Compiler
from serve_app.model.kernels.cuda.launcher import Grid
from serve_app.model.kernels.cuda.step_kernels import StepKernels
from serve_app.model.kernels.cuda.use_kernels import products_of, sizes_of
from serve_app.model.kernels.cuda.variants import CAPABILITIES, DENSE, GATE_UP, Card, shape_problem
from serve_app.model.kernels.unavailable import StepUnavailable
from serve_app.model.quantize import code_values
from tests.model.kernels.compiled import about, spills
from tests.model.kernels.cuda.emulator import CachedCompiler
from tools.random_model import config_of

CONFIG = config_of(tiny=False, layers=1)
"""Mixtral 8x7B."""
BUDGETS = {64: {1: 2.1, 2: 2.75, 4: 3.3, 8: 3.9, 16: 5.3}, 32: {2: 2.85, 4: 3.85, 8: 4.35}}
"""Instructions a weight in the kernel's loop for all its token tiles, by the table's stride and the
number of tiles. At the speed of memory an H200 has time for 3.7, cards with small tables for 15."""
LOOPS = {1: 1, 2: 2, 4: 4, 8: 4, 16: 4}
"""Loops of a kernel by its token tiles: the device chooses one for each expert."""
UNPACK_BUDGET = 4.0
"""Instructions a weight of unpack.cu. With a third of an H200's multiprocessors at 128 a cycle, the
1.45e9 weights of a layer take 0.5 ms at this budget, and 0.9 ms at the speed of its memory."""
KERNELS = {90: 19, 100: 13}
"""Kernels of the products by compute capability; the other ones have 12."""


@pytest.fixture(scope="module", autouse=True)
def _nvrtc() -> None:
    try:
        Compiler(90)
    except StepUnavailable as reason:
        pytest.skip(str(reason))


class _Kernel:
    def launch(self, *arguments: object) -> None:
        raise AssertionError("nothing is launched here")


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_they_compile_at_mixtrals_sizes(capability: int) -> None:
    """No register goes to memory, a block's shared memory fits, and each weight takes no more
    instructions than its budget."""
    compiler, card = CachedCompiler(capability), Card(capability, 1)
    failures, seen = list[str](), list[str]()

    def make(name: str, macros: list[str], grid: Grid) -> _Kernel:
        cubin, what = compiler.cubin(name, macros), f"{name} {' '.join(macros)}"
        seen.append(what)
        if spills(cubin):
            failures.append(f"{what} spills")
        if grid.shared_bytes > card.shared_bytes:
            failures.append(f"{what} takes {grid.shared_bytes} bytes of shared memory")
        if name == "unpack":
            count = instructions_per_unpacked_weight(about(cubin, "nvdisasm", "-c", "-ndf"))
            if not 2.5 < count <= UNPACK_BUDGET:
                failures.append(f"{what}: {count:.2f} instructions a weight")
        else:
            tiles = next(int(each[12:]) for each in macros if each.startswith("TOKEN_TILES="))
            stride = next(int(each[13:]) for each in macros if each.startswith("TABLE_STRIDE="))
            found = loops(listing(cubin))
            count = found[-1].instructions / (8 * found[-1].products / tiles)
            if len(found) != LOOPS[tiles] or not 1.5 < count <= BUDGETS[stride][tiles]:
                failures.append(f"{what}: {len(found)} loops, {count:.2f} instructions a weight")
            if found[0].cycles > found[-1].cycles:
                failures.append(f"{what}: the loop for few tokens is slower")
        return _Kernel()

    products_of(CONFIG, card, code_values("nf4"), make)  # type: ignore[arg-type]
    assert len(seen) == KERNELS.get(capability, 12)
    assert not failures, "\n".join(failures)


REGISTERS = {"add_norm": 128, "rope": 64, "attention": 168}
"""Most registers of a thread: what lets one block of 512 threads, four of 256 and three of 128 be
on a multiprocessor."""
INSTRUCTIONS = {"add_norm": {0: 250, 8: 1550}, "rope": {0: 190}, "attention": {0: 2500}}
"""Most instructions of a whole kernel, by the number of experts that it routes to. A step reaches
each kernel with nothing of it in the instruction cache."""


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_steps_other_kernels_compile(capability: int) -> None:
    """At Mixtral's sizes: no register goes to memory, and each kernel has no more registers and
    instructions than its budget."""
    compiler, config = CachedCompiler(capability), CONFIG
    failures, seen = list[str](), list[str]()

    def make(name: str, macros: list[str], grid: Grid) -> _Kernel:
        cubin, what = compiler.cubin(name, macros), f"{name} {' '.join(macros)}"
        seen.append(name)
        registers = int(re.findall(r"REG:(\d+)", about(cubin, "cuobjdump", "-res-usage"))[0])
        if spills(cubin) or registers > REGISTERS[name]:
            failures.append(f"{what} spills, or takes {registers} registers")
        experts = next((int(each[8:]) for each in macros if each.startswith("EXPERTS=")), 0)
        code = about(cubin, "nvdisasm", "-c", "-ndf")
        count = len(re.findall(r"^\s+/\*[0-9a-f]+\*/\s", code, re.M))
        if not 100 < count <= INSTRUCTIONS[name][experts]:
            failures.append(f"{what} has {count} instructions")
        if grid.shared_bytes > Card(capability, 1).shared_bytes:
            failures.append(f"{what} takes {grid.shared_bytes} bytes of shared memory")
        return _Kernel()

    StepKernels(config, Card(capability, 1), make)  # type: ignore[arg-type]
    assert seen == ["add_norm"] * 3 + ["rope", "attention"]
    assert not failures, "\n".join(failures)


def instructions_per_unpacked_weight(listing: str) -> float:
    """Counts the loop with the most stores; each stores 8 weights of every lane."""
    length, stores = longest_loop(listing, "STG.E.128")
    return length / (8 * stores) if stores else 0.0


def longest_loop(listing: str, instruction: str) -> tuple[int, int]:
    """The length of the loop with the most of an instruction, the shortest of these, and how many
    it has."""
    code, labels, best = list[str](), dict[str, int](), (0, 0)
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line):
            code.append(found[1])
            back = re.search(r"BRA.*\((\.L_x_\d+)\)", found[1])
            if back and back[1] in labels:
                body = code[labels[back[1]] :]
                best = max(best, (sum(instruction in each for each in body), -len(body)))
    return -best[1], best[0]


def test_a_source_that_does_not_compile_says_why() -> None:
    """The error has the compiler's own message."""
    with pytest.raises(StepUnavailable, match="few_tokens does not compile"):
        Compiler(90).cubin("few_tokens", ["OUTPUT=0"])


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_shapes_that_do_not_fit_are_refused(capability: int) -> None:
    """Mixtral's sizes fit every card; a matrix with other rows or columns is refused by name."""
    card = Card(capability, 1)
    for product, sizes in sizes_of(CONFIG).items():
        for size in sizes:
            assert shape_problem(product, card, *size) is None
    assert "256 rows and 192 columns" in str(shape_problem(GATE_UP, card, 256, 192))
    assert "need multiples of 32 and 2048" in str(shape_problem(DENSE, card, 4112, 4096))
