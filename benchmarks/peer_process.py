"""A peer's server while it runs: started in a process group of its own, and always ended whole.

Its output goes to a log file, which is kept. Ready means that it has answered a completion.
"""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests

from benchmarks.peer_environments import PeerError
from tests.processes import descendants

START_S = 240
"""Seconds a server may take to its first answer; vLLM compiles its model in them."""
END_S = 30


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def serving(
    command: list[str], variables: dict[str, str], url: str, first: dict[str, Any], log: Path
) -> Iterator[float]:
    """Runs `command` until the block ends; yields the seconds to its first answer to `first`.

    Raises `PeerError` when it ends or is not ready in time.
    """
    started = time.monotonic()
    with (
        log.open("ab") as output,
        subprocess.Popen(
            command,
            env=os.environ | variables,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process,
    ):
        try:
            while not _answers(url, first):
                if process.poll() is not None:
                    raise PeerError(f"Its server ended with code {process.returncode}; see {log}.")
                if time.monotonic() - started > START_S:
                    raise PeerError(f"It gave no answer in {START_S} s; see {log}.")
                time.sleep(0.5)
            yield time.monotonic() - started
        finally:
            end(process)


def _answers(url: str, first: dict[str, Any]) -> bool:
    try:
        body = first | {"stream": False}
        body.pop("stream_options", None)
        return requests.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200
    except requests.RequestException:
        return False


def end(process: subprocess.Popen[bytes]) -> None:
    """Asks the process to stop, then kills what is left of it, its group and its children."""
    below = {pid: _born(pid) for pid in descendants(process.pid)}
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # nobody is left in it
    for pid, born in below.items():  # those that made groups of their own
        if born is not None and _born(pid) == born:
            os.kill(pid, signal.SIGKILL)
    while any(born is not None and _born(pid) == born for pid, born in below.items()):
        time.sleep(0.01)  # the next server is to have the machine to itself


def _born(pid: int) -> str | None:
    """When the process began, by which it is told from a later one of its number; None when it is
    over. Its command line would not do: it changes when a child begins a program of its own."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
