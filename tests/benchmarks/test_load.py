"""The load generator, on a small server."""

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.load import Answer, arrival_times, closed_loop, open_loop, read
from serve_app.machine.ports import free_port
from tools.server_process import serving

SERVER = Path(__file__).with_name("completions.py")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port, folder = free_port(), tmp_path_factory.mktemp("server")
    command = [sys.executable, str(SERVER), str(port), str(folder / "child")]
    where = f"http://127.0.0.1:{port}"
    with serving(command, {}, where, {"prompt": "x", "max_tokens": 1}, folder / "log"):
        yield where


def request(number: int) -> dict[str, Any]:
    return {"prompt": {2: "fail", 3: "stop"}.get(number, "x"), "max_tokens": number + 1}


def test_closed_loop_counts_and_names_errors(url: str) -> None:
    """Every request is sent once; refused and unfinished answers are errors, the others count."""
    outcomes, wall_s = asyncio.run(closed_loop(url, request, 2, 6))
    by_tokens = {outcome.num_tokens: outcome for outcome in outcomes if not outcome.error}
    assert sorted(by_tokens) == [1, 2, 5, 6]
    assert {outcome.error for outcome in outcomes if outcome.error} == {"status 500", "unfinished"}
    assert by_tokens[5].text == " word" * 5
    assert by_tokens[5].prompt_tokens == 3
    assert wall_s >= max(outcome.arrivals[-1] for outcome in by_tokens.values())


def test_open_loop_sends_when_due(url: str) -> None:
    """No request is sent before it is due, and waiting counts from then."""
    outcomes, _ = asyncio.run(open_loop(url, lambda n: request(0), 100, 8, seed=3))
    assert [outcome.sent for outcome in outcomes] == arrival_times(100, 8, 3)
    assert all(outcome.arrivals[0] > outcome.sent for outcome in outcomes)


def test_a_server_that_is_not_there_is_an_error() -> None:
    """Requests to a closed port are errors, and the run ends."""
    outcomes, _ = asyncio.run(closed_loop(f"http://127.0.0.1:{free_port()}", request, 1, 2))
    assert [outcome.error for outcome in outcomes] == ["ClientConnectorError"] * 2


def test_arrivals_are_poisson() -> None:
    """Gaps are exponential: mean and standard deviation are one over the rate."""
    gaps = np.diff([0.0, *arrival_times(50, 20_000, seed=1)])
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.03)


def test_lines_are_read_across_parts() -> None:
    """A chunk has the time of its last byte; without usage, chunks are counted."""
    event = b'data: {"choices": [{"text": "a", "finish_reason": "length"}]}\n\n'
    parts = [(1.0, event[:20]), (2.0, event[20:] + event[:5]), (3.0, event[5:])]
    outcome = read(Answer(due=0.5, status=200, parts=parts))
    assert (outcome.arrivals, outcome.num_tokens) == ([2.0, 3.0], 2)
    assert (outcome.counted_by, outcome.error, outcome.text) == ("chunks", None, "aa")


@pytest.mark.parametrize(
    ("said", "name"),
    [
        (b"data: {broken", "unreadable"),
        (b'data: {"error": "out of luck"}', "out of luck"),
        (b'data: {"error": {"message": "No.", "code": null}}', "No."),
    ],
)
def test_a_peers_odd_errors_are_counted(said: bytes, name: str) -> None:
    """An unreadable event is an error of its answer alone."""
    assert read(Answer(due=0.0, status=200, parts=[(0.0, said + b"\n\n")])).error == name
