"""Starts `runpod_entry.py` in a process of its own, in the environment that the platform sets."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from emulator.platform import Platform
from emulator.worker_api import environment

ENTRY = Path(__file__).parents[1] / "runpod_entry.py"
KEPT = ("PATH", "LANG", "TMPDIR", "VIRTUAL_ENV", "COVERAGE_PROCESS_CONFIG")
"""Variables that a worker inherits from this process."""


class Worker:
    """A worker process; `with Worker(platform, home, SERVE_CONFIG=...)` runs it for the block.

    `home` becomes its home folder: RunPod credentials in the user's own home would override the key
    of the platform. Other keyword arguments are additional environment variables.
    """

    def __init__(
        self,
        platform: Platform,
        home: Path,
        *,
        script: Path = ENTRY,
        arguments: Sequence[str] = (),
        **more: str,
    ) -> None:
        self.home = home
        self.script = script
        self._command = [sys.executable, str(script), *arguments]
        self._log = home / "worker.log"
        self._environment = {
            **{name: os.environ[name] for name in KEPT if name in os.environ},
            **environment(platform.url),
            "HOME": str(home),
            "PYTHONPATH": str(ENTRY.parent),
            "RUNPOD_LOG_LEVEL": "INFO",
            **more,
        }
        self.process: subprocess.Popen[bytes]

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                self._command,
                env=self._environment,
                cwd=self._log.parent,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            raise

    def terminate(self) -> int:
        """Sends SIGTERM, waits for the end, and returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    @property
    def log(self) -> str:
        """The worker's output so far."""
        return self._log.read_text(encoding="utf-8", errors="replace")
