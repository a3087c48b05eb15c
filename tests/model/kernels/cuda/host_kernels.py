"""Host kernels that are compiled when they are first launched, equal ones once."""

from collections.abc import Sequence

from torch import Tensor

from serve_app.model.kernels.cuda.launcher import Grid
from tests.model.kernels.cuda.emulator import Edit, HostKernel


class LaterKernel:
    """A `HostKernel` whose attributes can be set before it is compiled."""

    def __init__(self, name: str, macros: Sequence[str], grid: Grid, edit: Edit | None) -> None:
        self.name = name
        self.late: tuple[int, ...] = ()
        self.late_parts: tuple[Tensor, ...] = ()
        self.is_reversed = False
        self._how = (name, macros, grid, edit)
        self._kernel: HostKernel | None = None

    def launch(self, *arguments: Tensor | int | None, blocks: int | None = None) -> None:
        if self._kernel is None:
            self._kernel = HostKernel(*self._how)
        self._kernel.late, self._kernel.late_parts = self.late, self.late_parts
        self._kernel.is_reversed = self.is_reversed
        self._kernel.launch(*arguments, blocks=blocks)


class HostKernels:
    """A `MakeKernel` with kernels for the host."""

    def __init__(self, edit: Edit | None = None) -> None:
        self._edit = edit
        self.made: dict[tuple[object, ...], LaterKernel] = {}

    def __call__(self, name: str, macros: Sequence[str], grid: Grid) -> LaterKernel:
        key = (name, *macros, grid)
        if key not in self.made:
            self.made[key] = LaterKernel(name, macros, grid, self._edit)
        return self.made[key]
