"""The decode step's small kernels for the host, and what a changed source computes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from serve_app.model.config import MixtralConfig
from serve_app.model.kernels.cuda.step_kernels import StepKernels
from serve_app.model.kernels.cuda.variants import Card
from tests.model.kernels.cuda.emulator import Edit
from tests.model.kernels.cuda.host_kernels import HostKernels
from tools.random_model import config_of

H, E, TOP_K, BLOCK_SIZE = 512, 5, 2, 16
ROUNDING = 3e-3
"""The rounding to bfloat16."""


def config(**shape: int) -> MixtralConfig:
    """Returns a configuration in which three query heads of 64 share a KV head."""
    sizes = {"hidden_size": H, "num_local_experts": E, "num_experts_per_tok": TOP_K}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64}
    return replace(config_of(tiny=True, layers=1), **{**sizes, **heads, **shape})  # type: ignore[arg-type]


class Bench:
    """Step kernels for the host."""

    def __init__(self, edit: Edit | None = None, **shape: int) -> None:
        self.config, self.make = config(**shape), HostKernels(edit)
        self.kernels = StepKernels(self.config, Card(90, 1), self.make)

    @contextmanager
    def late(self, *numbers: int, parts: tuple[Tensor, ...] = ()) -> Iterator[None]:
        """Arguments, and parts of them, that the kernel before writes."""
        for kernel in self.make.made.values():
            kernel.late, kernel.late_parts = numbers, parts
        yield
        for kernel in self.make.made.values():
            kernel.late, kernel.late_parts = (), ()

    def shuffle(self, seed: int) -> None:
        """Runs blocks and threads in a random order from now on; 0: in their order."""
        for kernel in self.make.made.values():
            kernel.seed = seed

    def reverse(self) -> None:
        """Runs blocks in the other order from now on."""
        for kernel in self.make.made.values():
            kernel.is_reversed = not kernel.is_reversed


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def error(found: Tensor, expected: Tensor) -> float:
    """Returns the relative error; infinity for a NaN, which max() would drop."""
    relative = (found.float() - expected.float()).norm() / expected.float().norm()
    return float(relative.nan_to_num(torch.inf))


def edited_error(
    compute: Callable[[Bench], float], file: str, old: str, new: str, seed: int = 0
) -> float:
    """Returns the error with one place of a source changed; infinity if a launch fails."""

    def edit(name: str, text: str) -> str:
        assert name != file or text.count(old) == 1
        return text.replace(old, new) if name == file else text

    bench = Bench(edit)
    bench.shuffle(seed)
    try:
        return compute(bench)
    except RuntimeError:
        return float("inf")
