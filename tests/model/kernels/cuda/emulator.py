"""Compiles a CUDA kernel's source for the host, with `emulated_intrinsics.cuh`, and runs it."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from serve_app.model.kernels.cuda.compiler import HEADERS, SOURCES
from serve_app.model.kernels.cuda.launcher import Grid, value_of

FAILURES = (
    "",
    "deadlock",
    "wrote beyond its shared memory",
    "misaligned address",
    "did not wait for the previous kernel",
    "wrote before the previous kernel had ended",
)
HERE = Path(__file__).parent
COMMAND = ("g++", "-std=c++17", "-shared", "-fPIC", "-w", "-U_FORTIFY_SOURCE")

Edit = Callable[[str, str], str]
"""Changes a source, given its file's name."""


def has_compiler() -> bool:
    return shutil.which("g++") is not None


class HostKernel:
    """A kernel of the host with the interface of `launcher.Kernel`."""

    def __init__(
        self, folder: Path, name: str, macros: Sequence[str], grid: Grid, edit: Edit | None = None
    ) -> None:
        """Compiles into the empty `folder`."""
        for path in (*(SOURCES / header for header in HEADERS[1:]), SOURCES / f"{name}.cu"):
            text = path.read_text()
            (folder / path.name).write_text(text if edit is None else edit(path.name, text))
        shutil.copy(HERE / "emulated_intrinsics.cuh", folder / "intrinsics.cuh")
        entry = folder / "entry.cpp"
        entry.write_text(
            f'#include "{name}.cu"\n'
            'extern "C" int start(host::Launch *launch, u64 *values, host::Tensor *tensors) {\n'
            f"  return host::run({name}, *launch, values, tensors);\n}}\n"
        )
        library = folder / "kernel.so"
        defined = [f"-D{macro}" for macro in macros]
        done = subprocess.run(
            [*COMMAND, "-O2" if edit is None else "-O1", *defined, "-o", str(library), str(entry)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        self._library, self._grid = ctypes.CDLL(str(library)), grid
        self.late: tuple[int, ...] = ()
        """Numbers of the arguments that the kernel before writes; they are NaN until the wait."""
        self.late_parts: tuple[Tensor, ...] = ()
        """Views of arguments of which the kernel before writes a part."""
        self.is_reversed = False
        """Whether the last block runs first."""

    def launch(self, *arguments: Tensor | int | None, blocks: int | None = None) -> None:
        """Runs the kernel; raises `RuntimeError` for what a GPU would hang or fail at."""
        values = (ctypes.c_ulonglong * len(arguments))(*map(value_of, arguments))
        tensors = []
        if self.late:
            for i, each in enumerate(arguments):
                if isinstance(each, Tensor):
                    assert each.is_contiguous()
                    tensors += [each.data_ptr(), each.nbytes, i in self.late]
            for part in self.late_parts:
                tensors += [part.data_ptr(), part.nbytes, 1]
        grid, waits = self._grid, self._grid.overlaps
        shape = (blocks or grid.blocks, grid.threads, grid.shared_bytes)
        launch = (ctypes.c_int * 6)(*shape, self.is_reversed, waits, len(tensors) // 3)
        failure = self._library.start(
            launch, values, (ctypes.c_ulonglong * (len(tensors) + 1))(*tensors)
        )
        if failure:
            raise RuntimeError(FAILURES[failure])
