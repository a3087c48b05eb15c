"""Compiles the CUDA kernels for one architecture by NVRTC, and keeps the results in a folder.

NVRTC and `cuda.bindings` come with torch's builds for CUDA. A file's name is the hash of sources,
options, compiler version and architecture, which determine its content.
"""

import hashlib
import os
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serve_app.model.kernels.unavailable import StepUnavailable

SOURCES = Path(__file__).parent
HEADERS = (
    *("intrinsics.cuh", "floats.cuh", "tiles.cuh", "routing.cuh", "splits.cuh"),
    *("noise.cuh", "logits.cuh", "found.cuh", "threshold.cuh"),
)
OPTIONS = ("-std=c++17", "-default-device")
"""`-default-device`: generic lambdas in kernels are functions of the device."""


class Compiler:
    """NVRTC for cards of one compute capability.

    Compiled kernels are read from the folder `cache`, then from the folders `filled`, such as the
    image's. New kernels are written to `cache`, unless it is None.
    """

    def __init__(
        self, capability: int, cache: Path | None = None, filled: Sequence[Path] = ()
    ) -> None:
        """Raises `StepUnavailable` if NVRTC is not installed."""
        try:
            from cuda.bindings import nvrtc

            error, *version = nvrtc.nvrtcVersion()
        except Exception as failure:  # the import may raise any exception if NVRTC is missing
            raise StepUnavailable(f"NVRTC is not installed ({str(failure)[:200]})") from None
        self._nvrtc: Any = nvrtc
        self._check(error)
        self.version = ".".join(map(str, version))
        self._options = [f"--gpu-architecture=sm_{capability}", *OPTIONS]
        self._cache, self._filled = cache, filled
        self._headers = [(SOURCES / name).read_bytes() for name in HEADERS]

    def cubin(self, name: str, macros: Sequence[str]) -> bytes:
        """Returns the machine code of `name`.cu with `macros`, such as "TOKEN_TILES=1".

        Raises `StepUnavailable` with the compiler's messages if the source does not compile.
        """
        source, options = self._program(name, macros)
        file = self.file_name(name, macros)
        folders = [*self._filled] if self._cache is None else [self._cache, *self._filled]
        for folder in folders:
            try:
                cubin = (folder / file).read_bytes()
            except OSError:
                continue
            if is_whole(cubin):
                return cubin
        cubin = self._compile(name, source, options)
        if self._cache is not None:
            write(self._cache / file, cubin)
        return cubin

    def file_name(self, name: str, macros: Sequence[str]) -> str:
        """Returns the name of the cache file for `name`.cu with `macros`."""
        return f"{name}-{self._digest(*self._program(name, macros))}.cubin"

    def capabilities(self) -> list[int]:
        """Returns the compute capabilities that this NVRTC supports, such as 90 for 9.0."""
        error, count = self._nvrtc.nvrtcGetNumSupportedArchs()
        self._check(error)
        error, capabilities = self._nvrtc.nvrtcGetSupportedArchs()
        self._check(error)
        return list(capabilities[:count])

    def _program(self, name: str, macros: Sequence[str]) -> tuple[bytes, list[str]]:
        """Returns the source and the compiler's options."""
        source = (SOURCES / f"{name}.cu").read_bytes()
        return source, [*self._options, *(f"-D{macro}" for macro in macros)]

    def _digest(self, source: bytes, options: list[str]) -> str:
        parts = [self.version.encode(), *self._headers, source, *map(str.encode, options)]
        digest = hashlib.sha256()
        for part in parts:
            digest.update(len(part).to_bytes(8, "little") + part)
        return digest.hexdigest()[:32]

    def _compile(self, name: str, source: bytes, options: list[str]) -> bytes:
        nvrtc, names = self._nvrtc, [header.encode() for header in HEADERS]
        made = nvrtc.nvrtcCreateProgram(
            source, f"{name}.cu".encode(), len(names), self._headers, names
        )
        self._check(made[0])
        program = made[1]
        try:
            (error,) = nvrtc.nvrtcCompileProgram(
                program, len(options), [option.encode() for option in options]
            )
            if int(error):
                raise StepUnavailable(f"{name} does not compile: {self._log(program)}")
            error, size = nvrtc.nvrtcGetCUBINSize(program)
            self._check(error)
            cubin = bytearray(size)
            self._check(*nvrtc.nvrtcGetCUBIN(program, cubin))
            return bytes(cubin)
        finally:
            nvrtc.nvrtcDestroyProgram(program)

    def _log(self, program: Any) -> str:
        """Returns the first 1,000 characters of the compiler's messages."""
        error, size = self._nvrtc.nvrtcGetProgramLogSize(program)
        self._check(error)
        text = bytearray(size)
        self._check(*self._nvrtc.nvrtcGetProgramLog(program, text))
        return text.decode(errors="replace").strip("\0\n ")[:1000]

    def _check(self, error: Any) -> None:
        if int(error):
            raise StepUnavailable(f"NVRTC failed: {error}")


def is_whole(cubin: bytes) -> bool:
    """Returns whether machine code in the ELF format is complete.

    After a power failure, a new file can be empty, full of zeros or truncated.
    """
    if len(cubin) < 64 or not cubin.startswith(b"\x7fELF"):
        return False
    segments, sections = struct.unpack_from("<QQ", cubin, 32)
    segment, num_segments, section, num_sections = struct.unpack_from("<4H", cubin, 54)
    end = max(segments + segment * num_segments, sections + section * num_sections)
    return bool(end <= len(cubin))


def write(path: Path, content: bytes) -> None:
    """Writes a file atomically, so that a reader never sees a partial one.

    Ignores an `OSError`, because the next start can compile again. The file has the permissions of
    the umask, because the image's build and its server may run as different users.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as place:
            temporary = Path(place) / path.name
            temporary.write_bytes(content)
            os.replace(temporary, path)
    except OSError:
        return
