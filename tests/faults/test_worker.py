"""A RunPod worker whose processes are killed under it: what each job hears."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.tiny import CHECKPOINT
from tests.emulator.platform import Platform
from tests.emulator.worker import Worker
from tests.worker.conftest import TINY, Client, until
from tests.worker.process import run_entry

pytestmark = [pytest.mark.faults, pytest.mark.ray]

LONG = {"prompt": "x", "ignore_eos": True, "max_tokens": 1500}


@pytest.fixture(scope="module")
def platform() -> Iterator[Platform]:
    with Platform() as platform:
        yield platform


@pytest.fixture(scope="module")
def worker(platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """One worker for all faults that it survives; the last test stops it."""
    home = tmp_path_factory.mktemp("home")
    with Worker(platform, home, SERVE_CONFIG=str(TINY)) as worker:
        yield worker


@pytest.fixture
def client(platform: Platform, worker: Worker) -> Client:
    return Client(platform)


def replica_of(pid: int) -> int:
    """The process of the replica among the descendants of `pid`."""
    parents: dict[int, int] = {}
    titles: dict[int, str] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                # "pid (name) state ppid ...", where the name may hold anything
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                titles[int(folder.name)] = (folder / "cmdline").read_text()
            except OSError:
                continue  # it has just ended
            parents[int(folder.name)] = int(fields[1])

    def is_ours(child: int) -> bool:
        while child not in (0, pid):
            child = parents.get(child, 0)
        return child == pid

    (replica,) = [p for p, t in titles.items() if "ServeReplica:mixtral" in t and is_ours(p)]
    return replica


def test_a_killed_replica_fails_the_stream_and_not_the_worker(
    client: Client, worker: Worker
) -> None:
    """A stream that has spoken ends with CONNECTION_ERROR; the next job is answered."""
    job = client.submit({**LONG, "stream": True})
    until(lambda: job.chunks)
    os.kill(replica_of(worker.process.pid), signal.SIGKILL)
    until(lambda: job.is_over)
    error = client.error_of(job)["error"]
    assert (error["status"], error["retry"]) == ("CONNECTION_ERROR", True)
    assert job.chunks[-1]["finish_reason"] == "error"
    assert client.ended({"prompt": "x", "max_tokens": 3}).status == "COMPLETED"


def test_a_killed_replica_costs_a_silent_job_nothing(client: Client, worker: Worker) -> None:
    """A job that has not said a word is tried once more, and its client never knows."""
    job = client.submit(LONG)

    def is_running() -> bool:
        health: dict[str, Any] = client.ended({"endpoint": "/health"}).output[0]
        return bool(health["engine"]["running"])

    until(is_running)
    os.kill(replica_of(worker.process.pid), signal.SIGKILL)
    until(lambda: job.is_over)
    assert job.status == "COMPLETED", job.error
    assert job.num_results == 1


def test_sigterm_during_a_job_is_answered(client: Client, worker: Worker) -> None:
    """Ray takes SIGTERM for itself when it starts; the SDK must have it back, and drain."""
    job = client.submit({**LONG, "stream": True})
    until(lambda: job.chunks)
    assert worker.terminate() == 0, worker.log
    assert (job.status, job.num_results) == ("COMPLETED", 1)
    assert job.output[-1]["usage"]["completion_tokens"] == 1500


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A configuration that passes every check, and a tokenizer that does not load."""
    checkpoint = shutil.copytree(CHECKPOINT, tmp_path / "broken")
    (checkpoint / "tokenizer_config.json").write_text('{"eos_token": 5}')
    config = yaml.safe_load(TINY.read_text())
    config["applications"][0]["args"]["model"]["name"] = str(checkpoint)
    path = tmp_path / "broken.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_http_ends_when_the_model_cannot_load(tmp_path: Path, broken: Path) -> None:
    """Unlike `serve run`, which prints traces and stays: the cause is the last line, code 1."""
    done = run_entry(tmp_path, SERVE_CONFIG=str(broken), RUNPOD_SERVERLESS="false", PORT="0")
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if " ERROR " in line]
    assert "tokenizer cannot be read" in errors[-1]


def test_a_model_that_cannot_load_says_why(tmp_path: Path, broken: Path) -> None:
    """Every waiting job hears the cause, the next one at once, and the worker lives on."""
    with Platform() as platform, Worker(platform, tmp_path, SERVE_CONFIG=str(broken)) as worker:
        client = Client(platform)
        jobs = [client.submit({"prompt": "x"}) for _ in range(3)]
        until(lambda: all(job.is_over for job in jobs))
        jobs.append(client.ended({"prompt": "x"}))
        health = client.ended({"endpoint": "/health"}).output[0]
        code = worker.terminate()
    for job in jobs:
        error = client.error_of(job)["error"]
        assert (error["status"], error["code"]) == ("MODEL_LOAD_FAILED", "model_load_failed")
        assert "tokenizer cannot be read" in error["message"]
    assert health["status"] == "failed"
    assert "tokenizer cannot be read" in health["reason"]
    assert code == 0


def test_a_lost_network_is_told_to_the_jobs(tmp_path: Path) -> None:
    """A hub that cannot be reached does not end the worker, which would leave its jobs waiting."""
    with (
        Platform() as platform,
        Worker(
            platform,
            tmp_path,
            SERVE_CONFIG=str(TINY),
            MODEL_NAME="owner/absent",
            HF_ENDPOINT="http://127.0.0.1:9",
        ) as worker,
    ):
        job = Client(platform).ended({"prompt": "x"})
        error = Client(platform).error_of(job)["error"]
        code = worker.terminate()
    assert (error["status"], error["retry"]) == ("MODEL_LOAD_FAILED", True)
    assert "owner/absent" in error["message"]
    assert code == 0
