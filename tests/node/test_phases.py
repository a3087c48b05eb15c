"""The phases of a load, as this process's log and clients have them."""

import logging
from pathlib import Path

import pytest

from serve_app.loading.load_log import LoadLog
from serve_app.loading.phases import Done, Phase, Running, Started
from serve_app.node import phases


def test_clients_hear_finished_phases_and_the_one_under_way() -> None:
    """The summary has the seconds of finished phases and the progress of the current one."""
    started = Started(phase=Phase.READ, at=1.0)
    done = Done(phase=Phase.TOKENIZER, seconds=1.5)
    running = Running(phase=Phase.READ, done=0.4)
    load = [{"phase": "tokenizer", "seconds": 1.5}]
    assert phases.summary([]) == {"load": []}
    assert phases.summary([done]) == {"load": load}
    assert phases.summary([done, started]) == {"load": load, "phase": "read"}
    far = {"done": 0.4, "progress": 40}
    assert phases.summary([done, started, running]) == {
        "load": load,
        "phase": "read",
        "message": "read: 40 %",
        **far,
    }
    summary = phases.summary(
        [done, started, Running(phase=Phase.READ, done=0.4, bytes=25_200_000_000)]
    )
    assert summary == {
        "load": load,
        "phase": "read",
        "message": "read: 40 %, 10.08 of 25.20 GB",
        **far,
    }


def test_phases_that_end_meanwhile_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A phase that ends in the block has one line, the last one too; an earlier phase has none."""
    caplog.set_level(logging.INFO)
    load_log = LoadLog(str(tmp_path / "load.jsonl"))
    load_log.done(Phase.RAY, 3.0)
    with phases.logged(str(tmp_path / "load.jsonl")):
        load_log.start(Phase.READ)
        load_log.done(Phase.TOKENIZER, 1.5)
        load_log.done(Phase.READ, 2.0)
    lines = [line for name, _, line in caplog.record_tuples if name == phases.__name__]
    assert lines == ["Cold start: tokenizer 1.5 s", "Cold start: read 2.0 s"]
