"""Answers a job on this machine with a plain function, for scripts and unit tests.

It runs `runpod_entry.py --answer_lines` in a process, so that Ray, its threads and its signal
handlers do not affect the caller. The model stays loaded for later calls; the process ends with the
caller's.
"""

import atexit
import functools
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

FLAG = "--answer_lines"
END_S = 30.0
"""Maximum seconds for the process to end Ray."""


def answer(entry: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Answers `job` with a process that runs the script `entry`, which the first call starts."""
    return _worker(entry).answer(job)


class LocalWorker:
    """The process that answers jobs, one after the other."""

    def __init__(self, entry: Path) -> None:
        self._lock = threading.Lock()
        # A session of its own, so that Ctrl-C ends the caller, and its end ends this process.
        self._process = subprocess.Popen(
            [sys.executable, str(entry), FLAG],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        atexit.register(self.close)

    def answer(self, job: dict[str, Any]) -> dict[str, Any]:
        """Returns `{"output"}`, or `{"error", "status", "retry"}`.

        Raises `RuntimeError` if the process has ended, for example after an error in the
        configuration.
        """
        line = json.dumps(job)
        with self._lock:
            try:
                print(line, file=self._process.stdin, flush=True)
                answered = self._process.stdout.readline() if self._process.stdout else ""
            except BrokenPipeError:
                answered = ""
            except BaseException:  # the answer would be taken for that of the next job
                self._process.kill()
                raise
        if not answered:
            _worker.cache_clear()
            code = self._process.wait()
            raise RuntimeError(
                f"The worker's process ended with code {code}; the cause is in its log."
            )
        returned: dict[str, Any] = json.loads(answered)
        return returned

    def close(self) -> None:
        """Ends the process."""
        try:
            self._process.communicate(timeout=END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
        except (BrokenPipeError, ValueError):
            self._process.wait()


@functools.cache
def _worker(entry: Path) -> LocalWorker:
    return LocalWorker(entry)
