"""`python -m serve_app.node.reaper MARK FOLDER` kills the processes that its parent leaves behind.

It waits for the end of standard input, which comes when the parent ends, also by `kill -9`. Then it
kills every process that has the string MARK in its environment, or an open file in a folder that
matches the expression FOLDER (a process that changes its title may overwrite its environment).
Without the reaper, Ray's processes would live for a minute, and a replica would hold the GPU's
memory for seconds. The parent starts one reaper, and kills it after a clean end.
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
    """Starts a reaper for this process and its descendants with `mark`, or with a file in
    `folder`."""
    command = [sys.executable, "-m", __spec__.name, mark, folder]
    home = Path(__file__).parents[2]
    # A session of its own, so that a signal to the parent's process group does not end it.
    return subprocess.Popen(command, stdin=subprocess.PIPE, cwd=home, start_new_session=True)


def marked(mark: str, folder: str) -> list[psutil.Process]:
    """Returns the living processes with `mark` or a file in `folder`, except this one."""
    marked_processes = []
    for process in psutil.process_iter():
        if process.pid != os.getpid():
            try:
                is_marked = _is_marked(Path("/proc") / str(process.pid), mark, folder)
            except OSError:
                continue  # it has ended, or belongs to another user
            if is_marked and processes.is_alive(process):
                marked_processes.append(process)
    return marked_processes


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
