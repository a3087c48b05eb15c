"""Launchable: the interface of a compiled kernel, which tests implement on the host."""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from serve_app.model.kernels.cuda.launcher import Grid


class Launchable(Protocol):
    """A compiled kernel; see `launcher.Kernel`."""

    def launch(self, *arguments: Tensor | int | None, blocks: int | None = None) -> None: ...


MakeKernel = Callable[[str, Sequence[str], Grid], Launchable]
"""A function `make(name, macros, grid)` that compiles `name`.cu with `macros` and loads it for
launches of `grid`."""
