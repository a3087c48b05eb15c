"""The sampler's kernel, compiled for cards that are not here."""

import re
from collections.abc import Sequence

import pytest
import torch

from serve_app.model.kernels.cuda.launcher import Grid
from serve_app.model.kernels.cuda.sampling import SampleKernel
from serve_app.model.kernels.cuda.variants import CAPABILITIES, Card
from serve_app.model.kernels.unavailable import StepUnavailable
from tests.model.kernels.compiled import about, spills
from tests.model.kernels.cuda.emulator import CachedCompiler

MAX_INSTRUCTIONS = 4600
"""Most instructions of the whole kernel. Nothing of it is in a cache when a step reaches it, so it
must be short."""


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_it_compiles_for_mixtrals_vocabulary(capability: int) -> None:
    """No register goes to memory, shared memory fits, and the code keeps its budget."""
    try:
        compiler = CachedCompiler(capability)
    except StepUnavailable as reason:
        pytest.skip(str(reason))
    cubins = list[bytes]()

    class Compiled:
        def __init__(self, name: str, macros: Sequence[str], grid: Grid) -> None:
            cubins.append(compiler.cubin(name, macros))
            assert grid.shared_bytes < Card(capability, 1).shared_bytes

        def launch(self, *arguments: object, blocks: int | None = None) -> None:
            raise AssertionError("nothing is launched here")

    SampleKernel(32_000, 1, Card(capability, 1), torch.device("cpu"), Compiled)
    assert not spills(cubins[0])
    code = about(cubins[0], "nvdisasm", "-c", "-ndf")
    assert 1000 < len(re.findall(r"^\s+/\*[0-9a-f]+\*/\s", code, re.M)) <= MAX_INSTRUCTIONS
