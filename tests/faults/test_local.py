"""Ctrl-C during `--test_input` ends all processes, with one log line."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from emulator.worker import ENTRY
from tests.processes import all_below, running
from tests.worker.conftest import TINY, until

pytestmark = [pytest.mark.faults, pytest.mark.ray]

JOB = '{"input": {"prompt": "x", "ignore_eos": true, "max_tokens": 16000}}'


@pytest.mark.parametrize("line", ["Cold start: process", "Cold start: ray", "Cold start: ready"])
def test_ctrl_c_ends_all_of_it(tmp_path: Path, line: str) -> None:
    """Ctrl-C at each stage of a start, and during a job, leaves no traceback and no process."""
    log = tmp_path / "log"
    with log.open("wb") as file:
        # A group of its own, which gets SIGINT as a whole, as in a terminal.
        process = subprocess.Popen(
            [sys.executable, str(ENTRY), "--test_input", JOB],
            env={**os.environ, "SERVE_CONFIG": str(TINY)},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        until(lambda: line in log.read_text())
        started = all_below(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(30) == 130, log.read_text()
        until(lambda: not started & running(), 30)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    output = log.read_text()
    assert output.count("Interrupted") == 1
    assert "Traceback" not in output
