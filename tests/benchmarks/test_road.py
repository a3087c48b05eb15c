"""The benchmark of the road out goes the whole of it, with a model that is none."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from benchmarks.cpu_time import seconds_by_part
from benchmarks.null_server import TEXT
from benchmarks.road import STREAMS, Alone, body
from tests.fakes import answer
from tests.worker.conftest import until

NUM_TOKENS = 6


@pytest.fixture(scope="module")
def alone() -> Iterator[Alone]:
    bench = Alone(NUM_TOKENS)
    yield bench
    bench.server.close()


def test_the_null_model_says_its_text(alone: Alone) -> None:
    """Tokens go through the real tokenizer and shapes: the answer is the text's beginning."""
    asked = {**body(NUM_TOKENS), "stream": False}
    del asked["stream_options"]
    whole = asyncio.run(answer(alone.server, "/v1/completions", asked))
    said = whole["choices"][0]["text"].strip()
    assert said
    assert TEXT.startswith(said)
    assert whole["usage"]["completion_tokens"] == NUM_TOKENS


@pytest.mark.parametrize("part", ["engine", "text and chunks", "events", "ingress"])
def test_every_part_of_the_road_is_gone_to_its_end(alone: Alone, part: str) -> None:
    """As many tokens as were asked for are made for each stream, and cost something."""
    before = alone.engine.stats().num_generation_tokens
    whole, own = alone.cost(part, STREAMS[1])
    assert alone.engine.stats().num_generation_tokens - before == STREAMS[1] * NUM_TOKENS
    assert whole > own > 0


def test_processor_time_is_told_by_what_a_process_is() -> None:
    """A busy child whose command line says so counts as the replica, and as nothing else."""
    command = [sys.executable, "-c", "while True: pass", "ray::ServeReplica:mixtral"]
    before = seconds_by_part(os.getpid())
    with subprocess.Popen(command) as child:
        try:
            until(lambda: seconds_by_part(os.getpid())["replica"] > before["replica"])
            assert seconds_by_part(os.getpid())["proxy"] == before["proxy"]
        finally:
            child.kill()
