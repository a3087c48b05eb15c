"""The Makefile's choice of a Python, with programs that pretend to be one."""

import subprocess
import sys
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[1] / "Makefile"
VERSION = "import sys; print(sys.version_info[1])"


def pretend(path: Path, minor: int) -> Path:
    """Writes a program that answers as Python 3.`minor`, makes such a .venv, and installs uv."""
    code = f"import sys; sys.version_info = (3, {minor}, 0); exec(sys.argv[1])"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"""#!/bin/sh
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip") touch "$(dirname "$0")/uv" ;;
  *) exec {sys.executable} -c '{code}' "$2" ;;
esac
"""
    )
    path.chmod(0o755)
    return path


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `make` in `folder` up to uv's installation, with the programs in its `bin` first."""
    return subprocess.run(
        ["make", "-f", str(MAKEFILE), ".venv/bin/uv", *arguments],
        cwd=folder,
        env={"PATH": f"{folder}/bin:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )


def venvs_minor(folder: Path) -> int:
    """Returns the minor version of the Python in `folder`'s .venv."""
    command = [str(folder / ".venv" / "bin" / "python"), "-c", VERSION]
    return int(subprocess.run(command, capture_output=True, check=True).stdout)


@pytest.mark.parametrize("minor", [10, 13])
def test_a_python_that_does_not_fit_is_an_error(tmp_path: Path, minor: int) -> None:
    """The message names it and what to do; nothing is made."""
    named = pretend(tmp_path / "bin" / "mine", minor)
    done = make(tmp_path, f"PYTHON={named}")
    assert done.returncode != 0
    assert f"needs Python 3.11 or 3.12; {named} is 3.{minor}. Name one that fits" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_the_first_python_that_fits_is_taken(tmp_path: Path) -> None:
    """If `python3` is too old, `python3.12` is used."""
    pretend(tmp_path / "bin" / "python3", 13)
    pretend(tmp_path / "bin" / "python3.12", 12)
    assert make(tmp_path).returncode == 0
    assert venvs_minor(tmp_path) == 12


@pytest.mark.parametrize(("has", "named", "then"), [(10, None, 11), (11, 12, 12)])
def test_a_venv_of_another_python_is_not_kept(
    tmp_path: Path, has: int, named: int | None, then: int
) -> None:
    """A .venv that does not fit, or is not of the Python that was named, is made anew."""
    pretend(tmp_path / "bin" / "python3", 11)
    pretend(tmp_path / ".venv" / "bin" / "python", has)
    (tmp_path / ".venv" / "bin" / "uv").touch()
    arguments = [] if named is None else [f"PYTHON={pretend(tmp_path / 'bin' / 'mine', named)}"]
    assert make(tmp_path, *arguments).returncode == 0
    assert venvs_minor(tmp_path) == then


def test_a_venv_that_fits_is_kept(tmp_path: Path) -> None:
    """Its Python was named once; later calls need not name it."""
    pretend(tmp_path / "bin" / "python3", 13)
    pretend(tmp_path / ".venv" / "bin" / "python", 12)
    (tmp_path / ".venv" / "kept").touch()
    assert make(tmp_path).returncode == 0
    assert (tmp_path / ".venv" / "kept").exists()


def test_the_versions_are_those_of_the_package() -> None:
    """The Makefile's limits are `requires-python` of pyproject.toml."""
    assert 'requires-python = ">=3.11,<3.13"' in MAKEFILE.with_name("pyproject.toml").read_text()
    assert "(3, 11) <= sys.version_info < (3, 13)" in MAKEFILE.read_text()
