"""Ray's worker processes: one of them imports a replica's libraries first."""

import importlib.util
import subprocess
import sys
from pathlib import Path

from serve_app.node import ray_worker


def test_one_process_of_a_session_imports(tmp_path: Path) -> None:
    """The first one that asks; a new session has a first one again."""
    assert ray_worker.is_first(tmp_path)
    assert not ray_worker.is_first(tmp_path)
    (tmp_path / "other").mkdir()
    assert ray_worker.is_first(tmp_path / "other")


def test_the_session_is_on_the_command_line() -> None:
    """Ray passes its folder in two flags; others have no value."""
    flags = ["--temp-dir=/tmp/ray", "--session-name=session_1", "--flag", "--url=http://a?b=c"]
    assert ray_worker.session_folder(flags) == Path("/tmp/ray/session_1")


def test_the_modules_exist() -> None:
    """Each module that the worker imports early exists; a misspelt name would end the worker."""
    assert [name for name in ray_worker.MODULES if importlib.util.find_spec(name) is None] == []


def test_it_is_rays_own_worker(tmp_path: Path) -> None:
    """After the imports Ray's program reads the command line."""
    (tmp_path / "session").mkdir()
    (tmp_path / "session" / ray_worker.CLAIM).touch()
    flags = [f"--temp-dir={tmp_path}", "--session-name=session", "--help"]
    command = [sys.executable, ray_worker.__file__, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "the auto-generated ID of the cluster" in done.stdout
