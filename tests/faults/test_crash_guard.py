"""Workers that die while they load, on one volume: the fourth one does not try."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from emulator.platform import Platform
from emulator.worker import Worker
from tests.mounts import mounted_folder
from tests.processes import replica_of
from tests.worker.conftest import TINY, Client, until

pytestmark = [pytest.mark.faults, pytest.mark.ray]


@pytest.fixture
def volume() -> Iterator[Path]:
    with mounted_folder() as folder:
        yield folder


def variables(volume: Path, **more: str) -> dict[str, Any]:
    return {
        "SERVE_CONFIG": str(TINY),
        "MIXTRAL_RUNPOD__VOLUME": str(volume),
        "MIXTRAL_RUNPOD__EXECUTION_TIMEOUT_S": "5",
        **more,
    }


def killed_while_loading(home: Path, volume: Path) -> tuple[dict[str, Any], str]:
    """Returns the first update of a job whose worker is killed as soon as it loads, and its log."""
    home.mkdir()
    with Platform() as platform, Worker(platform, home, **variables(volume)) as worker:
        job = Client(platform).submit({"prompt": "x"})
        until(lambda: job.progress and "Cold start: process" in worker.log)
        os.killpg(worker.process.pid, signal.SIGKILL)
        worker.process.wait()
        return job.progress[0], worker.log


def test_the_fourth_worker_does_not_try(tmp_path: Path, volume: Path) -> None:
    """After three loads that were killed, the fourth worker's jobs fail before Ray starts."""
    for number in range(3):
        update, log = killed_while_loading(tmp_path / str(number), volume)
        # Each of them had said, before anything else, that it will take longer than it may.
        assert (update["status"], update["expected_s"]) == ("loading", 11)
        assert "5 s are the endpoint's execution timeout" in update["warning"]
        assert "set `runpod.start` to eager" in update["warning"]
        assert log.index(update["warning"]) < log.index("Cold start: process")
    with Platform() as platform, Worker(platform, tmp_path, **variables(volume)) as worker:
        client = Client(platform)
        jobs = [client.ended({"prompt": "x"}) for _ in range(2)]
        assert worker.terminate() == 0
    for job in jobs:
        error = client.error_of(job)["error"]
        assert (error["status"], error["retry"]) == ("MODEL_LOAD_FAILED", False)
        assert "was killed while it loaded" in error["message"]
        assert f"until the model's settings change or {volume}" in error["message"]
    assert "Cold start: ray" not in worker.log


def test_a_replica_that_is_killed_while_it_loads(tmp_path: Path, volume: Path) -> None:
    """The job's error says what the load takes and what was free; the volume keeps the record."""
    with Platform() as platform, Worker(platform, tmp_path, **variables(volume)) as worker:
        client = Client(platform)
        job = client.submit({"prompt": "x"})
        until(lambda: "Cold start: replica" in worker.log)
        os.kill(replica_of(worker.process.pid), signal.SIGKILL)
        until(lambda: job.is_over)
        assert worker.terminate() == 0
    error = client.error_of(job)["error"]
    assert (error["status"], error["retry"]) == ("MODEL_LOAD_FAILED", True)
    assert "The process that loads the model was killed in phase device" in error["message"]
    assert "11.0 MB for its weights" in error["message"]
    assert len(list(volume.glob(".mixtral-serve/*/*.json"))) == 1
