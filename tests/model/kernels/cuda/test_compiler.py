"""Compiled kernels are kept in a folder."""

from pathlib import Path

import pytest

from serve_app.model.kernels.cuda.compiler import Compiler
from serve_app.model.kernels.unavailable import StepUnavailable

MACROS: tuple[str, ...] = ()


@pytest.fixture
def compiler(tmp_path: Path) -> Compiler:
    try:
        return Compiler(90, tmp_path / "cache")
    except StepUnavailable as reason:
        pytest.skip(str(reason))


def test_a_kernel_is_compiled_once(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second time its file is read; another card, another option or another source is another
    file, and nothing but whole files lies in the folder."""
    first = compiler.cubin("unpack", MACROS)
    (path,) = (tmp_path / "cache").iterdir()
    assert path.read_bytes() == first
    assert first.startswith(b"\x7fELF")
    with monkeypatch.context() as patch:
        patch.setattr(Compiler, "_compile", lambda *_: pytest.fail("compiled again"))
        assert Compiler(90, tmp_path / "cache").cubin("unpack", MACROS) == first
    Compiler(80, tmp_path / "cache").cubin("unpack", MACROS)
    compiler.cubin("unpack", ["UNUSED=1"])
    other = Compiler(90, tmp_path / "cache")
    other._headers = [header + b"\n" for header in other._headers]
    other.cubin("unpack", MACROS)
    files = [each.name for each in (tmp_path / "cache").iterdir()]
    assert len(files) == 4
    assert all(name.startswith("unpack-") and name.endswith(".cubin") for name in files)


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    """The kernel is compiled all the same."""
    (tmp_path / "file").touch()
    try:
        compiler = Compiler(90, tmp_path / "file" / "cache")
    except StepUnavailable as reason:
        pytest.skip(str(reason))
    assert compiler.cubin("unpack", MACROS).startswith(b"\x7fELF")
