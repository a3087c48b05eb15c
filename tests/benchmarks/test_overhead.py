"""The overhead benchmark passes every part of the server, with a null model."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from benchmarks.cpu_time import seconds_by_part
from benchmarks.null_server import TEXT
from benchmarks.overhead import STREAMS
from benchmarks.server_in_process import ServerInProcess, completion
from tests.fakes import answer
from tests.worker.conftest import until

NUM_TOKENS = 6


@pytest.fixture(scope="module")
def alone() -> Iterator[ServerInProcess]:
    bench = ServerInProcess(NUM_TOKENS)
    yield bench
    bench.server.close()


def test_the_null_model_answers_with_its_text(alone: ServerInProcess) -> None:
    """Tokens pass the real detokenizer and schemas: the answer is the beginning of the text."""
    asked = {**completion(NUM_TOKENS), "stream": False}
    del asked["stream_options"]
    whole = asyncio.run(answer(alone.server, "/v1/completions", asked))
    said = whole["choices"][0]["text"].strip()
    assert said
    assert TEXT.startswith(said)
    assert whole["usage"]["completion_tokens"] == NUM_TOKENS


@pytest.mark.parametrize("part", ["engine", "text and chunks", "events", "ingress"])
def test_every_part_generates_all_tokens(alone: ServerInProcess, part: str) -> None:
    """All streams get the tokens that they asked for, and the cost of a token is measured."""
    before = alone.engine.stats().num_generation_tokens
    whole, own = alone.cost(part, STREAMS[1])
    assert alone.engine.stats().num_generation_tokens - before == STREAMS[1] * NUM_TOKENS
    assert whole > own > 0


def test_processor_time_is_counted_by_kind_of_process() -> None:
    """A busy child with the replica's command line counts as the replica, and as nothing else."""
    command = [sys.executable, "-c", "while True: pass", "ray::ServeReplica:mixtral"]
    before = seconds_by_part(os.getpid())
    with subprocess.Popen(command) as child:
        try:
            until(lambda: seconds_by_part(os.getpid())["replica"] > before["replica"])
            assert seconds_by_part(os.getpid())["proxy"] == before["proxy"]
        finally:
            child.kill()
