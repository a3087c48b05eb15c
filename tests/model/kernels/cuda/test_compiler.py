"""Compiled kernels are kept in a folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from serve_app.model.config import MixtralConfig
from serve_app.model.kernels.cuda.compiler import Compiler
from serve_app.model.kernels.cuda.fill_cache import MIXTRAL_8X7B, fill_cache
from serve_app.model.kernels.cuda.launcher import Grid
from serve_app.model.kernels.cuda.sampling import SampleKernel
from serve_app.model.kernels.cuda.step_kernels import StepKernels
from serve_app.model.kernels.cuda.use_kernels import products_of
from serve_app.model.kernels.cuda.variants import Card
from serve_app.model.kernels.unavailable import StepUnavailable
from tools.random_model import config_of

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


@pytest.mark.parametrize("left", [0, -1])
def test_a_file_that_is_not_whole_is_compiled_again(
    compiler: Compiler, tmp_path: Path, left: int
) -> None:
    """A machine that failed after a write leaves an empty file, or one that is cut off."""
    made = compiler.cubin("unpack", MACROS)
    (path,) = (tmp_path / "cache").iterdir()
    path.write_bytes(made[:left])
    assert compiler.cubin("unpack", MACROS) == made == path.read_bytes()


def test_other_users_can_read_the_cache(compiler: Compiler, tmp_path: Path) -> None:
    """The umask applies, as to other files: a build and a server can be two users."""
    compiler.cubin("unpack", MACROS)
    (path,) = (tmp_path / "cache").iterdir()
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    """The kernel is compiled all the same."""
    (tmp_path / "file").touch()
    try:
        compiler = Compiler(90, tmp_path / "file" / "cache")
    except StepUnavailable as reason:
        pytest.skip(str(reason))
    assert compiler.cubin("unpack", MACROS).startswith(b"\x7fELF")


def test_a_cache_that_was_filled_has_every_kernel(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache that `fill_cache` filled without a GPU has every kernel that a server needs.

    The server compiles nothing, for any number of multiprocessors, and writes nothing to its own
    cache.
    """
    filled, done = tmp_path / "image", list[tuple[int, str]]()
    config = MixtralConfig.from_dict(MIXTRAL_8X7B)
    fill_cache(config, filled, [90], lambda *kernel: done.append(kernel))
    assert {capability for capability, _ in done} == {90}
    assert len(done) == len(list(filled.iterdir()))
    monkeypatch.setattr(Compiler, "_compile", lambda *_: pytest.fail("compiled again"))
    compiler = Compiler(90, tmp_path / "own", [filled])
    read: list[bytes] = []

    def make(name: str, macros: Sequence[str], grid: Grid) -> Any:
        read.append(compiler.cubin(name, macros))

    mixtral, card = config_of(tiny=False, layers=1), Card(90, 132)
    products_of(mixtral, card, torch.zeros(16), make)
    StepKernels(mixtral, card, make)
    SampleKernel(mixtral.vocab_size, 128, card, torch.device("cpu"), make)
    assert len(read) == len(done)
    assert not (tmp_path / "own").exists()


@pytest.mark.parametrize("capability", [52, 75, 990])
def test_what_the_kernels_cannot_run_on_is_refused(
    capability: int, compiler: Compiler, tmp_path: Path
) -> None:
    """Cards that are too old, or that NVRTC does not know: one sentence, and nothing is written."""
    config = MixtralConfig.from_dict(MIXTRAL_8X7B)
    with pytest.raises(StepUnavailable, match="is not supported"):
        fill_cache(config, tmp_path / "image", [capability], lambda *_: None)
    assert not list((tmp_path / "image").iterdir())
