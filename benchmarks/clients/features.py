"""The common part of all clients' programs: each registers its features, and `main` tries them.

A program is run as `python -m benchmarks.clients.NAME URL MODEL KEY TOKENIZER RESULTS [FEATURE]`
in the repository's folder, in an environment that has the client and none of this project's
dependencies. It writes JSON lines to the file RESULTS: the names of its features, then one object
for each that has ended.
"""

import asyncio
import inspect
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

FEATURE_S = 240
"""Seconds that one feature may take; a program that loads torch takes a minute to start."""
MAX_ERROR_CHARS = 600


@dataclass(frozen=True)
class Server:
    """The server that the clients use."""

    url: str
    """Without `/v1`."""
    model: str
    key: str
    tokenizer: str
    """The folder of the model's tokenizer, for clients that count tokens themselves."""

    @property
    def v1(self) -> str:
        return f"{self.url}/v1"


Check = Callable[[Server], Any]
E = TypeVar("E", bound=Exception)
CHECKS: dict[str, Check] = {}


def feature(check: Check) -> Check:
    """Registers a function, possibly async, that uses one feature and asserts what came of it."""
    CHECKS[check.__name__.replace("_", " ")] = check
    return check


def raised(kind: type[E], call: Callable[[], Any]) -> E:
    """Returns the error of this type that `call` raises."""
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def run_command(*command: str, variables: dict[str, str] | None = None) -> str:
    """Runs a client's command of this environment. Returns its standard output.

    Raises `RuntimeError` with the end of its output if it fails.
    """
    environment = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    done = subprocess.run(
        command,
        env=environment | (variables or {}),
        capture_output=True,
        text=True,
        timeout=FEATURE_S,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {(done.stdout + done.stderr)[-500:]}")
    return done.stdout


def _too_late(*_: object) -> None:
    raise TimeoutError(f"It took longer than {FEATURE_S} s.")


def _try(check: Check, server: Server) -> str | None:
    """Returns the error of one feature; None if it works."""
    signal.alarm(FEATURE_S)
    try:
        if inspect.iscoroutinefunction(check):
            asyncio.run(check(server))
        else:
            check(server)
    except Exception as error:
        traceback.print_exc()
        return _reason(error)
    finally:
        signal.alarm(0)
    return None


def _reason(error: Exception) -> str:
    """Returns the error in a line. An assertion has no message, so its line of source stands in for
    it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    said = str(error) or f"{frame.line}"
    if isinstance(error, AssertionError):
        said = f"{frame.line} (line {frame.lineno}) {error}".strip()
    return f"{type(error).__name__}: {said}"[:MAX_ERROR_CHARS]


def main() -> None:
    """Tries every registered feature, in order."""
    url, model, key, tokenizer, results, *chosen = sys.argv[1:]
    server = Server(url, model, key, tokenizer)
    checks = {name: check for name, check in CHECKS.items() if not chosen or name in chosen}
    signal.signal(signal.SIGALRM, _too_late)
    with open(results, "a", encoding="utf-8") as file:

        def write(value: Any) -> None:
            print(json.dumps(value), file=file, flush=True)

        write(list(checks))
        for name, check in checks.items():
            print(f"--- {name}", flush=True)
            write({"feature": name, "error": _try(check, server)})
