"""A volume is a mount in the kernel's table: real mounts, in mount namespaces."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from serve_app.machine.volume import PLACES, is_mounted, volume_folder, write_problem
from tests.mounts import NAMESPACE, can_mount, mounted_folder

needs_mounts = pytest.mark.skipif(not can_mount(), reason="the kernel allows no namespaces here")

STATE = """
import json, sys
from pathlib import Path
from serve_app.machine import volume
from serve_app.node import banner
chosen, *places = sys.argv[1:]
volume.PLACES = tuple(map(Path, places)) or volume.PLACES
folder = volume.volume_folder(chosen or None)
print(json.dumps([str(folder), volume.is_mounted(folder), banner.volume(folder)]))
"""


def in_namespace(commands: str, *arguments: str) -> tuple[str, bool, str]:
    """Returns the volume, whether it is mounted, and the banner's words, after the shell's
    `commands`."""
    python = shlex.join([sys.executable, "-c", STATE, *arguments])
    script = f"set -e\n{commands}\nexec {python}"
    done = subprocess.run(
        [*NAMESPACE, "sh", "-c", script], capture_output=True, text=True, check=True
    )
    folder, mounted, words = json.loads(done.stdout)
    return folder, mounted, words


@needs_mounts
@pytest.mark.parametrize("name", ["volume", "my volume"])
def test_a_folder_becomes_a_volume_by_its_mount(tmp_path: Path, name: str) -> None:
    """A folder of the image is no volume; with a mount on it, bind mounts included, it is one."""
    (folder := tmp_path / name).mkdir()
    (source := tmp_path / "disk").mkdir()
    where = shlex.quote(str(folder))
    _, mounted, words = in_namespace("true", str(folder))
    assert not mounted
    assert f"none is mounted at {folder}" in words
    for command in (f"mount -t tmpfs none {where}", f"mount --bind {source} {where}"):
        _, mounted, words = in_namespace(command, str(folder))
        assert mounted
        assert "it can be written" in words
    inner = f"mount --bind {source} {where}; mkdir -p {where}/team"
    assert in_namespace(inner, str(folder / "team"))[1]


@needs_mounts
def test_a_volume_that_is_read_only(tmp_path: Path) -> None:
    """The banner says that a mounted volume cannot be written, and why."""
    mount = f"mount -t tmpfs -o ro none {tmp_path}"
    _, mounted, words = in_namespace(mount, str(tmp_path))
    assert mounted
    assert f"{tmp_path} cannot be written by user 0 (Read-only file system)" in words


@needs_mounts
def test_the_first_place_that_is_mounted_is_taken(tmp_path: Path) -> None:
    """Serverless workers have /runpod-volume, pods /workspace: a folder without a mount loses."""
    assert list(map(str, PLACES)) == ["/runpod-volume", "/workspace"]
    first, second = (tmp_path / "runpod-volume", tmp_path / "workspace")
    for place in (first, second):
        place.mkdir()
    places = ("", str(first), str(second))
    assert in_namespace("true", *places)[:2] == (str(first), False)
    pod = f"mount -t tmpfs none {second}"
    assert in_namespace(pod, *places)[:2] == (str(second), True)
    assert in_namespace(f"{pod}; mount -t tmpfs none {first}", *places)[:2] == (str(first), True)


def test_a_chosen_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    """`runpod.volume` is the folder; one that will be made is mounted if what is above it is."""
    assert volume_folder(str(tmp_path)) == tmp_path
    with mounted_folder() as folder:
        assert is_mounted(folder)
        assert is_mounted(folder / "team" / "models")
        assert write_problem(folder / "team" / "models") is None
        (file := folder / "file").touch()
        assert not is_mounted(file)


@needs_mounts
def test_a_folder_that_will_be_made_on_a_volume(tmp_path: Path) -> None:
    """The first worker finds no folder yet; one beside the volume is none."""
    mount = f"mount -t tmpfs none {tmp_path}"
    _, mounted, words = in_namespace(mount, str(tmp_path / "team"))
    assert mounted
    assert "it can be written" in words
    assert not in_namespace("true", str(tmp_path / "team"))[1]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_volume_of_root_and_a_server_that_is_not() -> None:
    """A volume that belongs to root cannot be written by user 1000; the error names the user."""
    with mounted_folder() as folder:
        assert write_problem(folder / "new" / "folder") is None
        pid = os.fork()
        if pid == 0:
            os.setuid(1000)
            problem = write_problem(folder / "new")
            expected = f"{folder} cannot be written by user 1000 (Permission denied)"
            os._exit(0 if problem == expected else 1)
        assert os.waitpid(pid, 0)[1] == 0
