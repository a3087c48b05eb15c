"""`--test_input '{"input": {...}}'` and `./test_input.json`: one job, really run, on this machine.

The SDK's own local mode prints a generator handler's name and calls it a success; this runs the
job and prints its output as JSON on standard output, on a line of its own.
"""

import asyncio
import contextlib
import json
import logging
import signal
import sys
from pathlib import Path
from typing import Any

from serve_app.config.settings import ConfigError, EntrySettings, Settings
from serve_app.node import ray_node
from serve_app.worker.start import make_handler

log = logging.getLogger(__name__)

INPUT_FILE = Path("test_input.json")
INTERRUPTED = 130
"""What a shell says of a command that SIGINT has ended: 128 and its number."""


def find(text: str | None, entry: EntrySettings) -> dict[str, Any] | None:
    """The job on the command line, else the one in `./test_input.json` where nothing else is asked.

    Raises `ConfigError` where it is not a JSON object.
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


def run(settings: Settings, config: str | Path, job: dict[str, Any]) -> int:
    """Runs `job` and prints its output, or its error; 0 or 1, or 130 after Ctrl-C."""
    # A thread of Ray's may still wait for a process that is ended, and Python for that thread.
    return ray_node.ended(_run_to_its_end(settings, config, job))


def _run_to_its_end(settings: Settings, config: str | Path, job: dict[str, Any]) -> int:
    # Ray prints what its processes say to standard output, which is for the answer alone.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            output, error = asyncio.run(_run(settings, config, job))
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # while Ray's processes are ended
            log.info("Interrupted; the job is not answered.")
            return INTERRUPTED
        finally:
            ray_node.stop()
    if error is not None:
        print(error)
        return 1
    print(json.dumps(output[0] if len(output) == 1 else output, ensure_ascii=False))
    return 0


async def _run(
    settings: Settings, config: str | Path, job: dict[str, Any]
) -> tuple[list[Any], str | None]:
    """What the platform would keep: all that was yielded, or the error's JSON string."""
    said: list[str] = []

    async def tell(job: dict[str, Any], update: dict[str, Any]) -> None:
        if "message" in update:
            log.info("%s", update["message"])
            return
        phase = update.get("phase", "Ray")
        if phase not in said:
            said.append(phase)
            log.info("Loading: %s", phase)

    handler = make_handler(settings, config, tell)
    output: list[Any] = []
    async for value in handler.handle({"id": "local", **job}):
        if isinstance(value, dict) and isinstance(value.get("error"), str):
            return output, value["error"]
        output.append(value)
    return output, None
