"""Compiles a CUDA kernel's source for the host, with `emulated_intrinsics.cuh`, and runs it."""

import ctypes
import functools
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from serve_app.model.kernels.cuda.compiler import HEADERS, SOURCES, Compiler
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
CACHE = HERE.parents[3] / ".pytest_cache" / "d"
"""Compiled kernels by the hash of their sources and options, for all processes and later runs:
`host_kernels` by g++, `cubins` by NVRTC. `pytest --cache-clear` deletes them."""
UNUSED_DAYS = 7
"""Days after which a compiled kernel that no test has used is deleted."""

Edit = Callable[[str, str], str]
"""Changes a source, given its file's name."""


def has_compiler() -> bool:
    return shutil.which("g++") is not None


@functools.cache
def compiler_version() -> str:
    return subprocess.run([COMMAND[0], "--version"], capture_output=True, text=True).stdout


def mark_used(path: Path) -> None:
    """Notes that `path`, a file of `CACHE`, is in use, and deletes those of its folder that have
    not been used for `UNUSED_DAYS`: nearly all belong to sources that have changed."""
    path.touch()
    oldest = time.time() - UNUSED_DAYS * 24 * 3600
    for each in path.parent.iterdir():
        try:
            if each.is_file() and each.stat().st_mtime < oldest:
                each.unlink()
        except FileNotFoundError:  # another process was faster
            continue


class CachedCompiler(Compiler):
    """A compiler whose results are kept in `CACHE`."""

    def __init__(self, capability: int) -> None:
        """Raises `StepUnavailable` where NVRTC is not installed."""
        super().__init__(capability, CACHE / "cubins")

    def cubin(self, name: str, macros: Sequence[str]) -> bytes:
        made = super().cubin(name, macros)
        mark_used(CACHE / "cubins" / self.file_name(name, macros))
        return made


def compiled(files: dict[str, str], options: Sequence[str]) -> Path:
    """Returns the library of `files`, texts by name; compiles `entry.cpp` unless `CACHE` has it."""
    made_of = json.dumps([files, *COMMAND, *options, compiler_version()])
    folder = CACHE / "host_kernels"
    library = folder / f"{hashlib.sha256(made_of.encode()).hexdigest()[:32]}.so"
    if library.exists():
        mark_used(library)
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        for name, text in files.items():
            (Path(place) / name).write_text(text)
        command = [*COMMAND, *options, "-o", "kernel.so", "entry.cpp"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=place)
        assert done.returncode == 0, done.stderr
        os.replace(Path(place) / "kernel.so", library)
    mark_used(library)
    return library


class HostKernel:
    """A kernel of the host with the interface of `launcher.Kernel`."""

    def __init__(
        self, name: str, macros: Sequence[str], grid: Grid, edit: Edit | None = None
    ) -> None:
        files, is_edited = {}, False
        for path in (*(SOURCES / header for header in HEADERS[1:]), SOURCES / f"{name}.cu"):
            text = path.read_text()
            files[path.name] = text if edit is None else edit(path.name, text)
            is_edited |= files[path.name] != text
        files["intrinsics.cuh"] = (HERE / "emulated_intrinsics.cuh").read_text()
        files["entry.cpp"] = (
            f'#include "{name}.cu"\n'
            'extern "C" int start(host::Launch *launch, u64 *values, host::Tensor *tensors) {\n'
            f"  return host::run({name}, *launch, values, tensors);\n}}\n"
        )
        level = "-O1" if is_edited else "-O2"
        library = compiled(files, [level, *(f"-D{macro}" for macro in macros)])
        self._library, self._grid = ctypes.CDLL(str(library)), grid
        self.late: tuple[int, ...] = ()
        """Numbers of the arguments that the kernel before writes; they are NaN until the wait."""
        self.late_parts: tuple[Tensor, ...] = ()
        """Views of arguments of which the kernel before writes a part."""
        self.is_reversed = False
        """Whether the last block runs first."""
        self.seed = 0
        """Makes the order of blocks and threads random, if it is not 0."""

    def launch(self, *arguments: Tensor | int | None, blocks: int | None = None) -> None:
        """Runs the kernel; raises `RuntimeError` for what a GPU would hang or fail at."""
        values = (ctypes.c_ulonglong * len(arguments))(*map(value_of, arguments))
        tensors = []
        if self.late or self.late_parts:
            for i, each in enumerate(arguments):
                if isinstance(each, Tensor):
                    assert each.is_contiguous()
                    tensors += [each.data_ptr(), each.nbytes, i in self.late]
            for part in self.late_parts:
                tensors += [part.data_ptr(), part.nbytes, 1]
        grid, waits = self._grid, self._grid.overlaps
        shape = (blocks or grid.blocks, grid.threads, grid.shared_bytes)
        how = (self.is_reversed, waits, self.seed, len(tensors) // 3)
        launch = (ctypes.c_int * 7)(*shape, *how)
        failure = self._library.start(
            launch, values, (ctypes.c_ulonglong * (len(tensors) + 1))(*tensors)
        )
        if failure:
            raise RuntimeError(FAILURES[failure])
