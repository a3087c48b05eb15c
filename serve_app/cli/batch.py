"""`mixtral-serve batch`: answers a file of requests with the model in this process.

A second call with the same files continues: it answers the requests that have no result yet.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from serve_app.api import batch
from serve_app.api.server import MixtralServer
from serve_app.cli import progress
from serve_app.cli.batch_files import BatchInput, BatchOutput
from serve_app.cli.terminal_log import log_to_terminal
from serve_app.cold_start.check import check_start
from serve_app.config import named
from serve_app.config.serve_config import ConfigError
from serve_app.config.settings import Settings
from serve_app.loading.load import load
from serve_app.protocol.batch import BatchRequest, BatchResult

log = logging.getLogger(__name__)


def run(config: str, source: Path, destination: Path) -> int:
    """Answers the requests in `source` and appends the results to `destination`.

    Returns the exit code: 0 if every request was answered, 1 if `destination` contains an error.
    Raises `ConfigError` or `ServeError` if the batch cannot start or continue.
    """
    if source.exists() and destination.exists() and source.samefile(destination):
        raise ConfigError(
            f"{destination}: this is the file of requests; name another file for the results."
        )
    requests = BatchInput(source, batch.URLS)
    output = BatchOutput(destination)
    try:
        keys = {key for key, _ in requests}
        if unexpected := [key for key in output if key not in keys]:
            raise ConfigError(
                f"{destination}: contains a result for {unexpected[0]!r}, which is not in "
                f"{source}; name another file."
            )
        if len(output) < len(keys):
            _answer_rest(named.find(config), requests, output, len(keys))
    finally:
        output.close()
    print(f"{destination}: {len(output.answered)} answered, {len(output.failed)} failed.")
    return 1 if output.failed else 0


def _answer_rest(path: Path, requests: BatchInput, output: BatchOutput, num_lines: int) -> None:
    """Loads the model and answers the requests that have no result."""
    log_to_terminal()
    settings = Settings.from_yaml(path)
    checked = check_start(path, settings)
    for line in checked.lines[1:]:  # the first one says that the file is valid
        log.info("%s", line)
    server = MixtralServer(settings, partial(load, plan=checked.plan))
    started = time.perf_counter()
    num_before, num_tokens = len(output), 0
    try:
        with progress.items("Answering", "requests") as show:

            def write(result: BatchResult) -> None:
                nonlocal num_tokens
                output.write(result)
                num_tokens += batch.num_tokens(result)
                show(len(output), num_lines, "")

            show(num_before, num_lines, "")
            asyncio.run(batch.answer_all(server, _unanswered(requests, output, write), write))
    finally:
        server.close()
    seconds = time.perf_counter() - started
    log.info(
        "%d requests in %.1f s: %.1f generated tokens/s.",
        len(output) - num_before,
        seconds,
        num_tokens / seconds,
    )


def _unanswered(
    requests: BatchInput, output: BatchOutput, write: Callable[[BatchResult], None]
) -> Iterator[BatchRequest]:
    """Yields the requests without a result. Writes an error result for each line without a
    request."""
    for key, line in requests:
        if key in output:
            continue
        if isinstance(line, BatchRequest):
            yield line
        else:
            write(line)
