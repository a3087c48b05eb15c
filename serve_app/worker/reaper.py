"""`python -m serve_app.worker.reaper MARK`: kills what this process's parent leaves behind.

Waits for the end of standard input, which comes when the parent ends, also by `kill -9`; then kills
every process with the string MARK in its environment. Ray's own processes would stay for a minute,
and its replica for seconds with the GPU's memory. The parent starts it once, and kills it when
there is nothing left to do.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

from serve_app.worker import processes
from serve_app.worker.processes import Process


def start(mark: str) -> "subprocess.Popen[bytes]":
    """The reaper of this process and its descendants with `mark`."""
    command = [sys.executable, "-m", __spec__.name, mark]
    folder = Path(__file__).parents[2]
    # A session of its own: what ends the worker's group must not end it first.
    return subprocess.Popen(command, stdin=subprocess.PIPE, cwd=folder, start_new_session=True)


def marked(mark: str) -> list[Process]:
    """The living processes with `mark` in their environment, except this one."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                has_mark = mark.encode() in (folder / "environ").read_bytes()
            except OSError:
                continue  # it has ended, or belongs to somebody else
            if has_mark and (process := processes.read(int(folder.name))) is not None:
                found.append(process)
    return found


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    mark = sys.argv[1]
    sys.stdin.buffer.read()
    processes.end(lambda: marked(mark))


if __name__ == "__main__":
    main()
