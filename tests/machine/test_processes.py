"""Descendants are found and killed, also those of a process that has died."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_app.machine import processes
from serve_app.node import reaper
from tests.processes import all_below, running
from tests.worker.conftest import until

FAMILY = """
import os, subprocess, sys, time
from serve_app.machine import processes
from serve_app.node import reaper
{before}
if os.fork() == 0:
    time.sleep(1000)
os.environ["KIN"] = "kin-1"
child = [sys.executable, "-c", "import time; time.sleep(1000)"]
subprocess.Popen(child, start_new_session=True)
import pathlib, tempfile
folder = pathlib.Path(tempfile.mkdtemp()) / "kin-2"
folder.mkdir()
with (folder / "log").open("w") as log:
    subprocess.Popen(child, env={{}}, stdout=log)
print("ready", flush=True)
time.sleep(1000)
"""


@pytest.fixture
def family(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process with a fork and a child; the parameter is what it does before it has them."""
    command = [sys.executable, "-c", FAMILY.format(before=request.param)]
    # In another folder, so that it imports the installed package.
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process
        processes.kill(lambda: [it for it in processes.descendants() if it.ppid() == process.pid])
        process.kill()


@pytest.mark.parametrize("family", ["pass"], indirect=True)
def test_descendants_are_found_and_ended(family: subprocess.Popen[bytes]) -> None:
    """All descendants are found, in other sessions too, and no other process."""
    expected = all_below(family.pid)
    found = processes.descendants(family.pid)
    assert set(found) == expected
    assert len(found) == 3
    assert processes.kill(lambda: processes.descendants(family.pid)) == []
    assert not any(processes.is_alive(it) for it in found)
    assert family.poll() is None


def test_a_process_knows_its_age_within_a_clock_tick() -> None:
    """Its age lies between the times that its parent measures around it."""
    program = "from serve_app.machine.processes import own_age_s as age; print(age(), flush=True)"
    program += "; input(); print(age())"
    tick = 1 / os.sysconf("SC_CLK_TCK")
    before = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        after = time.monotonic()
        assert process.stdout is not None
        assert float(process.stdout.readline()) <= time.monotonic() - before + tick
        least = time.monotonic() - after
        age = float(process.communicate(b"\n")[0])
    assert least <= age <= time.monotonic() - before + tick


def test_a_fork_ends_without_its_parents_handler(tmp_path: Path) -> None:
    """A fork, such as the SDK's heartbeat, does not run its parent's handler of SIGTERM."""
    code = """
import os, signal, time
from serve_app.machine import processes
processes.end_forks_with_this()
signal.signal(signal.SIGTERM, lambda *_: print("told", flush=True))
reads, writes = os.pipe()
child = os.fork()
if child == 0:
    os.write(writes, b".")
    time.sleep(1000)
os.read(reads, 1)
os.kill(child, signal.SIGTERM)
print(os.WTERMSIG(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{signal.SIGTERM:d}\n"


@pytest.mark.parametrize(
    "family",
    ["processes.end_forks_with_this(); reaper.start('KIN=kin-1', '/kin-[0-9]+/')"],
    indirect=True,
    ids=["guarded"],  # pytest puts the name into every process's environment
)
def test_nothing_outlives_a_killed_process(family: subprocess.Popen[bytes]) -> None:
    """The kernel kills the fork; the reaper kills the marked processes and ends."""
    left = all_below(family.pid)
    assert len(left) == 4
    assert len(reaper.marked("KIN=kin-1", "^no such$")) == 1
    assert len(reaper.marked("KIN=no such", "/kin-[0-9]+/")) == 1
    family.kill()
    family.wait()
    until(lambda: not left & running(), timeout_s=20)


def test_blocked_alarms_end_nothing() -> None:
    """An alarm, such as Ray's own, does not end the process, whichever thread could take it."""
    code = """
import os, signal, threading
from serve_app.machine import processes
processes.block_alarms()
over = threading.Event()
threading.Thread(target=over.wait).start()
os.kill(os.getpid(), signal.SIGALRM)
over.set()
"""
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == 0
