"""Runs a server for a test or a benchmark: starts it, waits until it answers, and ends it.

The server has a process group of its own. Its output goes to a log file, which is kept.
"""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import requests

from serve_app.machine.processes import descendants, is_alive

START_S = 600
"""Maximum seconds to the first answer; vLLM compiles its model before it, which takes minutes on a
busy machine."""
END_S = 30
"""Maximum seconds for a server's own shutdown; then it is killed."""
START_POLL_S = 0.5
END_POLL_S = 0.01


class ServerError(RuntimeError):
    """A server did not start. The message is the reason."""


@contextmanager
def serving(
    command: list[str],
    variables: dict[str, str],
    url: str,
    first: dict[str, Any],
    log: Path,
    key: str = "",
) -> Iterator[float]:
    """Runs `command` until the block ends; yields the seconds to its first answer.

    `first` is the body of a completion that the server must answer, `key` its API key. Raises
    `ServerError` if it ends before, or takes longer than `START_S`.
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
            while not _answers(url, first, key):
                if process.poll() is not None:
                    code = process.returncode
                    raise ServerError(f"Its server ended with code {code}; see {log}.")
                if time.monotonic() - started > START_S:
                    raise ServerError(f"It gave no answer in {START_S} s; see {log}.")
                time.sleep(START_POLL_S)
            yield time.monotonic() - started
        finally:
            end(process)


def _answers(url: str, first: dict[str, Any], key: str) -> bool:
    try:
        body = first | {"stream": False}
        body.pop("stream_options", None)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        answer = requests.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60)
        return answer.status_code == 200
    except requests.RequestException:
        return False


def end(process: subprocess.Popen[bytes]) -> None:
    """Asks the process to stop, then kills its remaining group and descendants.

    Returns when all of them have ended, so that the next server has the machine to itself.
    """
    below = descendants(process.pid)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for child in below:  # some have made process groups of their own
        with suppress(psutil.NoSuchProcess):
            child.kill()
    while any(is_alive(child) for child in below):
        time.sleep(END_POLL_S)
