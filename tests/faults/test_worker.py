"""A RunPod worker whose processes are killed: how each job ends."""

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from emulator import client_api
from emulator.platform import Platform
from emulator.queue import Job
from emulator.worker import ENTRY, Worker
from tests.faults.conftest import spoil
from tests.processes import all_below, one_below, ray_below, running
from tests.settled import settled
from tests.worker.conftest import TINY, Client, until

pytestmark = [pytest.mark.faults, pytest.mark.ray]

LONG = {"prompt": "x", "ignore_eos": True, "max_tokens": 5000}


@pytest.fixture(scope="module")
def platform() -> Iterator[Platform]:
    with Platform() as platform:
        yield platform


@pytest.fixture(scope="module")
def worker(platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """One worker for all faults that it survives; SIGTERM ends it in the last of them."""
    home = tmp_path_factory.mktemp("home")
    with Worker(platform, home, SERVE_CONFIG=str(TINY)) as worker:
        yield worker


@pytest.fixture
def client(platform: Platform, worker: Worker) -> Iterator[Client]:
    """A client of the worker; after each test every job is accounted for and no block in use."""
    yield Client(platform)
    settled(platform, worker)


def health_of(client: Client) -> dict[str, Any]:
    """Returns the output of a `/health` job."""
    output: dict[str, Any] = client.ended({"endpoint": "/health"}).output
    return output


def both_run(client: Client, num_running: int = 2) -> tuple[Job, Job]:
    """Returns a stream that has posted chunks and a plain job, both running in the engine, which
    then runs `num_running` jobs."""
    stream, silent = client.submit({**LONG, "stream": True}), client.submit(LONG)
    until(lambda: stream.chunks)
    until(lambda: health_of(client)["engine"]["running"] == num_running)
    return stream, silent


def has_lost_the_model(client: Client, stream: Job) -> bool:
    """Returns whether the stream's last chunk and the job's error both say to send it again."""
    error = client.error_of(stream)["error"]
    assert stream.chunks[-1]["finish_reason"] == "error"
    return (error["status"], error["retry"]) == ("CONNECTION_ERROR", True)


@pytest.mark.parametrize("victim", ["ServeReplica:mixtral", "/raylet ", "/gcs_server "])
def test_a_killed_part_is_started_again(client: Client, worker: Worker, victim: str) -> None:
    """A killed process fails a stream, delays a plain job, and leaves no process behind."""
    assert client.ended({"prompt": "x", "max_tokens": 3}).status == "COMPLETED"
    before = ray_below(worker.process.pid)
    stream, silent = both_run(client)
    os.kill(one_below(worker.process.pid, victim), signal.SIGKILL)
    until(lambda: stream.is_over and silent.is_over)
    assert has_lost_the_model(client, stream)
    assert silent.status == "COMPLETED", silent.error
    assert (stream.num_results, silent.num_results) == (1, 1)
    health = health_of(client)
    assert (health["status"], health["engine"]["kv_blocks_used"]) == ("ready", 0)
    assert not before & running(), "something of the dead Ray lives on"


def test_a_killed_replica_ends_each_apis_stream_in_its_way(
    client: Client, platform: Platform, worker: Worker
) -> None:
    """The clients of OpenAI and Anthropic raise what ends their streams through the gateway, and a
    plain stream ends with its own last chunk."""
    url = f"{platform.url}/v2/ep/openai"
    theirs = openai.OpenAI(base_url=f"{url}/v1", api_key=client_api.KEY, max_retries=0)
    other = anthropic.Anthropic(base_url=url, auth_token=client_api.KEY, max_retries=0)
    said: Any = [{"role": "user", "content": "x"}]
    more: Any = {"extra_body": {"ignore_eos": True}, "model": "tiny", "stream": True}
    long = {"type": "object", "properties": {"a": {"type": "string", "minLength": 5000}}}
    form: Any = {"format": {"type": "json_schema", "schema": {**long, "required": ["a"]}}}
    streams: list[Any] = [
        theirs.chat.completions.create(messages=said, max_tokens=5000, **more),
        theirs.responses.create(input="x", max_output_tokens=5000, **more),
        other.messages.create(
            messages=said, max_tokens=5000, model="tiny", stream=True, output_config=form
        ),
    ]
    events = [[next(stream)] for stream in streams]
    plain, silent = both_run(client, num_running=5)
    os.kill(one_below(worker.process.pid, "ServeReplica:mixtral"), signal.SIGKILL)
    for stream, seen in zip(streams, events, strict=True):
        with pytest.raises((openai.APIError, anthropic.APIError), match="process has ended"):
            seen.extend(stream)
    assert has_lost_the_model(client, plain)
    until(lambda: silent.is_over)
    failed = [job for job in platform.queue.jobs.values() if "openai_route" in str(job.request)]
    responses, messages = (json.loads(job.chunks[-1].split("data: ")[-1]) for job in failed[-2:])
    assert (responses["type"], responses["code"]) == ("error", "engine_dead")
    assert responses["sequence_number"] > events[1][-1].sequence_number
    assert (messages["type"], messages["error"]["type"]) == ("error", "api_error")


FAILING = """
import importlib.util, pathlib, sys

class Finder:
    def find_spec(self, name, path, target=None):
        if name != "serve_app.engine.core":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            step = module.EngineCore._step

            def failing(core):
                if pathlib.Path("FILE").exists():
                    raise RuntimeError
                step(core)

            module.EngineCore._step = failing

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""
"""A `sitecustomize.py`, with which the engine's loop fails while FILE exists."""


def test_a_failed_engine_is_started_again(tmp_path: Path) -> None:
    """An engine that fails in a living replica fails a stream and delays a plain job."""
    file = tmp_path / "fail"
    (tmp_path / "sitecustomize.py").write_text(FAILING.replace("FILE", str(file)))
    folders = f"{tmp_path}{os.pathsep}{ENTRY.parent}"
    with (
        Platform() as platform,
        Worker(platform, tmp_path, SERVE_CONFIG=str(TINY), PYTHONPATH=folders) as worker,
    ):
        client = Client(platform)
        assert client.ended({"prompt": "x", "max_tokens": 3}).status == "COMPLETED"
        stream, silent = both_run(client)
        file.touch()
        until(lambda: stream.is_over)
        file.unlink()
        until(lambda: silent.is_over)
        assert has_lost_the_model(client, stream)
        assert silent.status == "COMPLETED", silent.error
        assert worker.terminate() == 0
        settled(platform, worker)


def test_sigterm_during_a_job_is_answered(client: Client, worker: Worker) -> None:
    """After Ray's start, which takes SIGTERM for itself, the worker still drains on SIGTERM."""
    job = client.submit({**LONG, "max_tokens": 1500, "stream": True})
    until(lambda: job.chunks)
    assert worker.terminate() == 0, worker.log
    assert (job.status, job.num_results) == ("COMPLETED", 1)
    assert job.output[-1]["usage"]["completion_tokens"] == 1500


def test_a_model_that_cannot_load_fails_the_jobs(
    tmp_path: Path, config: Path, checkpoint: Path
) -> None:
    """A load that fails fails every waiting and later job with the cause; the worker goes on."""
    spoil(checkpoint)
    with Platform() as platform, Worker(platform, tmp_path, SERVE_CONFIG=str(config)) as worker:
        client = Client(platform)
        jobs = [client.submit({"prompt": "x"}) for _ in range(3)]
        until(lambda: all(job.is_over for job in jobs))
        jobs.append(client.ended({"prompt": "x"}))
        health = client.ended({"endpoint": "/health"}).output
        code = worker.terminate()
        settled(platform, worker)
    for job in jobs:
        error = client.error_of(job)["error"]
        assert (error["status"], error["code"]) == ("MODEL_LOAD_FAILED", "model_load_failed")
        assert "special tokens cannot be read" in error["message"]
    assert health["status"] == "failed"
    assert "special tokens cannot be read" in health["reason"]
    assert code == 0


def test_a_lost_network_fails_the_jobs(tmp_path: Path) -> None:
    """An unreachable hub fails the jobs and does not end the worker."""
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
        settled(platform, worker)
    assert (error["status"], error["retry"]) == ("MODEL_LOAD_FAILED", True)
    assert "owner/absent" in error["message"]
    assert code == 0


def test_a_model_that_does_not_load_again_ends_the_worker(
    tmp_path: Path, config: Path, checkpoint: Path
) -> None:
    """A restart that fails fails all jobs with the cause, and ends the worker with code 1."""
    with Platform() as platform, Worker(platform, tmp_path, SERVE_CONFIG=str(config)) as worker:
        client = Client(platform)
        assert client.ended({"prompt": "x", "max_tokens": 3}).status == "COMPLETED"
        stream, silent = both_run(client)
        left = ray_below(worker.process.pid)
        spoil(checkpoint)
        os.kill(one_below(worker.process.pid, "ServeReplica:mixtral"), signal.SIGKILL)
        until(lambda: stream.is_over)
        late = client.submit({"prompt": "x"})
        assert worker.process.wait(60) == 1, worker.log
        settled(platform, worker)
    assert has_lost_the_model(client, stream)
    for job in (silent, late):
        error = client.error_of(job)["error"]
        assert error["status"] == "MODEL_LOAD_FAILED"
        assert "special tokens cannot be read" in error["message"]
    assert [job.num_results for job in (stream, silent, late)] == [1, 1, 1]
    assert not left & running()


def test_a_model_that_dies_of_its_jobs_ends_the_worker(tmp_path: Path) -> None:
    """A model that dies twice without an answer in between ends the worker with code 1."""
    with Platform() as platform, Worker(platform, tmp_path, SERVE_CONFIG=str(TINY)) as worker:
        client = Client(platform)
        assert client.ended({"prompt": "x", "max_tokens": 3}).status == "COMPLETED"
        jobs: list[Job] = []
        for _ in range(2):
            stream, silent = both_run(client)
            jobs += [stream, silent]
            left = ray_below(worker.process.pid)
            os.kill(one_below(worker.process.pid, "ServeReplica:mixtral"), signal.SIGKILL)
            until(lambda: jobs[-2].is_over)  # noqa: B023
            client.cancel(jobs[-1])
        until(lambda: all(job.is_over for job in jobs))
        assert worker.process.wait(60) == 1, worker.log
        settled(platform, worker)
    assert has_lost_the_model(client, jobs[0])
    assert has_lost_the_model(client, jobs[2])
    assert "again before the model answered a job" in worker.log
    assert not left & running()


def test_nothing_outlives_a_killed_worker(tmp_path: Path) -> None:
    """After `kill -9` of the worker its heartbeat stops and Ray is gone."""
    with Platform() as platform, Worker(platform, tmp_path, SERVE_CONFIG=str(TINY)) as worker:
        client = Client(platform)
        platform.queue.silence_s = 5.0
        job = client.submit({**LONG, "max_tokens": 16_000, "stream": True})
        until(lambda: job.chunks)
        left = all_below(worker.process.pid)
        assert len(left - ray_below(worker.process.pid)) == 2, "no heartbeat, or no reaper"
        worker.process.kill()
        worker.process.wait()
        with contextlib.suppress(AssertionError):
            until(lambda: not left & running(), timeout_s=20)
        assert not left & running()
        num_pings = len(platform.queue.pings)
        until(lambda: job.status == "IN_QUEUE")
        assert len(platform.queue.pings) == num_pings
