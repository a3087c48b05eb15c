"""Host kernels that are compiled when they are first launched, equal ones once."""

from collections.abc import Iterator, Sequence

import torch
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
        self.seed = 0
        self._how = (name, macros, grid, edit)
        self._kernel: HostKernel | None = None

    def launch(self, *arguments: Tensor | int | None, blocks: int | None = None) -> None:
        if self._kernel is None:
            self._kernel = HostKernel(*self._how)
        self._kernel.late, self._kernel.late_parts = self.late, self.late_parts
        self._kernel.is_reversed, self._kernel.seed = self.is_reversed, self.seed
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


class OverlappingKernels(HostKernels):
    """Kernels that start before the one before them has written anything, as they may on a GPU.

    What the last launch has changed is NaN for the next one until that has waited. The kernels
    before the last one have ended, which is what `wait_for_previous` in intrinsics.cuh promises.
    """

    def __init__(self, edit: Edit | None = None, seed: int = 0) -> None:
        super().__init__(edit)
        self._seed = seed
        self.changes: list[tuple[str, int]] = []
        """The launches: the kernel's name, and the bytes that its arguments owed to the last."""
        self._changed: list[tuple[int, int]] = []

    def __call__(self, name: str, macros: Sequence[str], grid: Grid) -> LaterKernel:
        is_known = (name, *macros, grid) in self.made
        made = super().__call__(name, macros, grid)
        if is_known:
            return made
        launch = made.launch

        def overlapping(*arguments: Tensor | int | None, blocks: int | None = None) -> None:
            views = [view_of(each) for each in arguments if isinstance(each, Tensor)]
            made.late_parts = tuple(self._late(views))
            made.seed = self._seed
            self.changes.append((name, sum(map(len, made.late_parts))))
            before = [view.clone() for view in views]
            launch(*arguments, blocks=blocks)
            self._changed = [
                (view.data_ptr() + start, view.data_ptr() + end)
                for view, old in zip(views, before, strict=True)
                for start, end in runs(view != old)
            ]

        made.launch = overlapping  # type: ignore[method-assign]
        return made

    def _late(self, views: list[Tensor]) -> Iterator[Tensor]:
        """The parts of `views` that the last launch has changed."""
        for view in views:
            at = view.data_ptr()
            for start, end in self._changed:
                first, stop = max(start - at, 0), min(end - at, len(view))
                if first < stop:
                    yield view[first:stop]


def view_of(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, uint8 `[bytes]`."""
    return tensor.view(-1).view(torch.uint8)


def runs(changed: Tensor) -> list[tuple[int, int]]:
    """The first and the last number, plus 1, of the runs of True in `changed`, in words of 4."""
    words = changed.view(-1, 4).any(1).int() if len(changed) % 4 == 0 else changed.int()
    size = len(changed) // len(words)
    edges = torch.diff(words, prepend=words.new_zeros(1), append=words.new_zeros(1))
    starts, ends = ((edges == sign).nonzero()[:, 0] * size for sign in (1, -1))
    return list(zip(starts.tolist(), ends.tolist(), strict=True))
