"""Runs jobs on this machine: `--test_input '{"input": {...}}'`, or `./test_input.json`.

Prints the output that the platform would show for the job, as one line of JSON on standard output.
The SDK's own local mode does not run a generator handler: it prints the generator's name and
reports success.

`answer_lines` is the process behind `local_handler`: it answers a job for each line of standard
input.
"""

import asyncio
import contextlib
import json
import logging
import signal
import sys
import uuid
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TextIO

from serve_app.cold_start.check import Checked
from serve_app.config.settings import ConfigError, EntrySettings, Settings
from serve_app.errors import ModelLoadFailed
from serve_app.loading.phases import Phase
from serve_app.node import ray_node, ray_thread
from serve_app.protocol.call import JsonObject
from serve_app.worker.handler import Handler
from serve_app.worker.result import Result
from serve_app.worker.start import make_handler

log = logging.getLogger(__name__)

INPUT_FILE = Path("test_input.json")
INTERRUPTED = 130
"""Exit code after SIGINT, as in a shell: 128 plus the signal's number."""


def find(text: str | None, entry: EntrySettings) -> dict[str, Any] | None:
    """Returns the job `text` from the command line, otherwise the one in `./test_input.json`.

    The file is read only if the environment requests neither jobs nor HTTP. Raises `ConfigError` if
    the job is not a JSON object.
    """
    if text is not None:
        return _parse(text, "--test_input")
    is_asked_otherwise = entry.runpod_webhook_get_job is not None or not entry.runpod_serverless
    if is_asked_otherwise or not INPUT_FILE.exists():
        return None
    return _parse(INPUT_FILE.read_text(encoding="utf-8"), str(INPUT_FILE))


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        job = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where}: is not valid JSON ({error}).") from None
    if not isinstance(job, dict):
        raise ConfigError(f'{where}: must be an object such as {{"input": {{...}}}}.')
    return job


def run(checked: Checked, config: str | Path, job: dict[str, Any]) -> int:
    """Runs `job` and prints its output, or its error. Returns 0 or 1, or 130 after Ctrl-C."""
    out = sys.stdout

    async def answer(handler: Handler) -> int:
        result = await _result(handler, job)
        write(result, out)
        return 0 if result.error is None else 1

    return _with_ray(make_handler(checked.settings, config, checked.plan), answer)


def write(result: Result, out: TextIO) -> None:
    """Writes the output or the error of `result` to `out` as one line of UTF-8.

    JSON is UTF-8 whatever the encoding of the terminal, which may lack some of its characters.
    """
    out.buffer.write(result.output if result.error is None else result.error.encode())
    out.buffer.write(b"\n")
    out.flush()


def answer_lines(settings: Settings, config: str | Path, checked: Checked | ModelLoadFailed) -> int:
    """Answers the job in each line of standard input with a line of JSON.

    The line is `{"output"}`, or `{"error": message, "status", "retry"}`. Returns the exit code at
    the end of the input.
    """
    out = sys.stdout
    if isinstance(checked, ModelLoadFailed):
        handler = make_handler(settings, config, None, None if checked.retry else checked)
    else:
        handler = make_handler(settings, config, checked.plan)

    async def answer(handler: Handler) -> int:
        while line := await asyncio.to_thread(sys.stdin.readline):
            result = await _result(handler, json.loads(line))
            print(json.dumps(_returned(result)), file=out, flush=True)
        return 0

    return _with_ray(handler, answer)


def _returned(result: Result) -> dict[str, Any]:
    if result.error is None:
        return {"output": json.loads(result.output)}
    error = json.loads(result.error)["error"]
    return {"error": error["message"], "status": error["status"], "retry": error["retry"]}


async def _result(handler: Handler, job: dict[str, Any]) -> Result:
    posts = LogPosts()
    await handler.answer({"id": "local", **job}, posts)
    (result,) = posts.results
    return result


def _with_ray(handler: Handler, answer: Callable[[Handler], Coroutine[Any, Any, int]]) -> int:
    """Runs `answer`, then ends Ray. Returns the exit code."""
    code = INTERRUPTED
    # Ray prints its processes' output to standard output, which is for the answer alone.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            code = asyncio.run(answer(handler))
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # while Ray's processes are ended
            log.info("Interrupted: the job is not answered.")
            # Serve's router has tasks in a thread of its own, which fail while Ray ends.
            for name in ("asyncio", "ray.serve"):
                logging.getLogger(name).setLevel(logging.CRITICAL)
        finally:
            ray_node.stop()
    # A thread of Ray may still wait for an ended process, and Python's exit would wait for it.
    return ray_thread.ended(code)


class LogPosts:
    """The posts of a job without a platform: progress goes to the log, the result is kept."""

    def __init__(self) -> None:
        self.results: list[Result] = []
        self.request_id = uuid.uuid4().hex
        self.last_chunk: JsonObject = {}
        self._phases: set[str] = set()

    async def progress(self, update: dict[str, Any]) -> None:
        phase = update.get("phase", Phase.RAY)  # the first phase has not been logged yet
        if "message" in update:
            log.info("%s", update["message"])
        elif phase not in self._phases:
            self._phases.add(phase)
            log.info("Loading: %s", phase)

    async def chunk(self, value: bytes) -> None:
        """Does nothing, because the result contains every chunk."""

    async def result(self, result: Result) -> None:
        self.results.append(result)
