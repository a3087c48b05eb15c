"""Folders in /tmp: removed by their owner, or by the next start after its death."""

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_app.machine import own_folder
from tests.mounts import NAMESPACE, can_mount

HOLD = """
import sys
from serve_app.machine import own_folder
print(own_folder.create(sys.argv[1]), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def prefix() -> str:
    return f"mixtral-test-{uuid.uuid4().hex[:8]}-"


@pytest.fixture
def owner(prefix: str) -> Iterator["subprocess.Popen[str]"]:
    """Another process with a folder, whose path is the first line that it prints."""
    command = [sys.executable, "-c", HOLD, prefix]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        yield process
        process.kill()


def test_a_folder_of_a_killed_process_is_removed_by_the_next(
    owner: "subprocess.Popen[str]", prefix: str
) -> None:
    """As long as its owner lives, the folder stays."""
    assert owner.stdout
    folder = Path(owner.stdout.readline().strip())
    (folder / "file").touch()
    own_folder.remove(own_folder.create(prefix))
    assert (folder / "file").exists()
    owner.kill()
    owner.wait()
    last = own_folder.create(prefix)
    assert not folder.exists()
    assert last.stat().st_mode & 0o777 == 0o700
    own_folder.remove(last)
    assert not last.exists()


def test_what_has_no_lock_of_ours_stays(prefix: str) -> None:
    """A folder without the file, and a link to a folder that has one, are not touched."""
    other = Path(own_folder.ROOT, f"{prefix}other")
    target = Path(own_folder.ROOT, f"x{prefix}")
    link = Path(own_folder.ROOT, f"{prefix}link")
    other.mkdir()
    target.mkdir()
    (target / own_folder.LOCK).touch()
    link.symlink_to(target)
    try:
        own_folder.remove(own_folder.create(prefix))
        assert other.exists()
        assert (target / own_folder.LOCK).exists()
    finally:
        other.rmdir()
        link.unlink()
        (target / own_folder.LOCK).unlink()
        target.rmdir()


@pytest.mark.skipif(
    shutil.which("systemd-tmpfiles") is None, reason="systemd-tmpfiles is not installed"
)
def test_systemd_leaves_the_folder_of_a_living_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """systemd-tmpfiles, which removes old files from /tmp, removes those of a folder only after its
    owner's end."""
    monkeypatch.setattr(own_folder, "ROOT", str(tmp_path))
    rules = tmp_path / "rules.conf"
    rules.write_text(f"e {tmp_path} - - - 0\n")  # files of any age
    clean = ["systemd-tmpfiles", "--clean", str(rules)]
    folder = own_folder.create("mixtral-")
    (folder / "file").touch()
    subprocess.run(clean, check=True)
    assert (folder / "file").exists()
    for descriptor in own_folder._held.pop(folder):
        os.close(descriptor)
    rules.write_text(f"e {tmp_path} - - - 0\n")
    subprocess.run(clean, check=True)
    assert not folder.exists()


@pytest.mark.skipif(not can_mount(), reason="the kernel allows no namespaces here")
@pytest.mark.skipif(
    sys.executable.startswith("/tmp/"), reason="the read-only /tmp would hide this Python"
)
def test_a_tmp_that_cannot_be_written_is_reported() -> None:
    """On a read-only /tmp, as on a container's read-only root, one sentence says what to mount."""
    code = (
        "from serve_app.errors import MachineUnfit\n"
        "from serve_app.machine import own_folder\n"
        "try: own_folder.create('test-')\n"
        "except MachineUnfit as error: print(error)"
    )
    script = 'mount -t tmpfs -o ro none /tmp && exec "$0" -c "$1"'
    done = subprocess.run(
        [*NAMESPACE, "sh", "-c", script, sys.executable, code], capture_output=True, text=True
    )
    assert "docker run --tmpfs /tmp" in done.stdout, done.stderr
