"""Compiles a CUDA kernel's source for the host, with `emulated_intrinsics.cuh`, and runs it."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from serve_app.model.kernels.cuda.compiler import SOURCES
from serve_app.model.kernels.cuda.launcher import Grid, value_of

FAILURES = ("", "deadlock", "wrote beyond its shared memory", "misaligned address")
HERE = Path(__file__).parent
COMMAND = ("g++", "-std=c++17", "-O2", "-shared", "-fPIC", "-w", "-U_FORTIFY_SOURCE")

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
        for path in (SOURCES / "tiles.cuh", SOURCES / f"{name}.cu"):
            text = path.read_text()
            (folder / path.name).write_text(text if edit is None else edit(path.name, text))
        shutil.copy(HERE / "emulated_intrinsics.cuh", folder / "intrinsics.cuh")
        entry = folder / "entry.cpp"
        entry.write_text(
            f'#include "{name}.cu"\n'
            'extern "C" int start(int blocks, int threads, int shared, const u64 *values) {\n'
            f"  return host::run({name}, blocks, threads, shared, values);\n}}\n"
        )
        library = folder / "kernel.so"
        defined = [f"-D{macro}" for macro in macros]
        done = subprocess.run(
            [*COMMAND, *defined, "-o", str(library), str(entry)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        self._library, self._grid = ctypes.CDLL(str(library)), grid

    def launch(self, *arguments: Tensor | int | None) -> None:
        """Runs the kernel; raises `RuntimeError` for what a GPU would hang or fail at."""
        values = (ctypes.c_ulonglong * len(arguments))(*map(value_of, arguments))
        grid = self._grid
        failure = self._library.start(grid.blocks, grid.threads, grid.shared_bytes, values)
        if failure:
            raise RuntimeError(FAILURES[failure])
