"""`python -m serve_app.node.reaper MARK FOLDER`: kills what this process's parent leaves behind.

Waits for the end of standard input, which comes when the parent ends, also by `kill -9`; then kills
every process with the string MARK in its environment, or with an open file in a folder that the
expression FOLDER finds, as a process that changes its title may overwrite the former. Ray's own
processes would stay for a minute, and its replica for seconds with the GPU's memory. The parent
starts it once, and kills it when there is nothing left to do.
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from serve_app.machine import processes


def start(mark: str, folder: str) -> "subprocess.Popen[bytes]":
    """The reaper of this process and its descendants with `mark`, or a file in `folder`."""
    command = [sys.executable, "-m", __spec__.name, mark, folder]
    home = Path(__file__).parents[2]
    # A session of its own: what ends the worker's group must not end it first.
    return subprocess.Popen(command, stdin=subprocess.PIPE, cwd=home, start_new_session=True)


def marked(mark: str, folder: str) -> list[psutil.Process]:
    """The living processes with `mark` or a file in `folder`, except this one."""
    found = []
    for process in psutil.process_iter():
        if process.pid != os.getpid():
            try:
                is_marked = _is_marked(Path("/proc") / str(process.pid), mark, folder)
            except OSError:
                continue  # it has ended, or belongs to another user
            if is_marked and processes.is_alive(process):
                found.append(process)
    return found


def _is_marked(process: Path, mark: str, folder: str) -> bool:
    if mark.encode() in (process / "environ").read_bytes():
        return True
    files = os.listdir(process / "fd")
    return any(re.search(folder, os.readlink(process / "fd" / file)) for file in files)


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    mark, folder = sys.argv[1:]
    sys.stdin.buffer.read()
    processes.kill(lambda: marked(mark, folder))


if __name__ == "__main__":
    main()
