"""Whole paths: the platform on loopback, the real SDK, Ray, the tiny model."""

import json
import re
from typing import Any

import pytest

from emulator import client_api
from emulator.queue import Job
from emulator.worker import Worker
from tests.listening import listening, open_to_strangers
from tests.processes import descendants
from tests.settled import settled
from tests.worker.conftest import Client, until

pytestmark = pytest.mark.ray

GREEDY = {"temperature": 0, "max_tokens": 12}
PROMPT = {"prompt": "What is 2 + 3?", **GREEDY}


def test_a_cold_worker_says_idle(first_jobs: list[Job]) -> None:
    """A health job does not start the model."""
    assert first_jobs[0].output == {"status": "idle", "load": []}


def test_the_first_jobs_start_the_model_once(client: Client, first_jobs: list[Job]) -> None:
    """Two jobs wait for one start; each gets progress updates and one result."""
    jobs = first_jobs[1:]
    for job in jobs:
        assert job.status == "COMPLETED", job.error
        assert {update["status"] for update in job.progress} == {"loading"}
        assert (job.num_results, job.num_late_posts) == (1, 0)
    assert jobs[0].output == jobs[1].output
    health = client.ended({"endpoint": "/health"}).output
    assert health["status"] == "ready"


def test_the_cold_start_is_reported_by_phase(client: Client, tiny_worker: Worker) -> None:
    """Every phase from the process to the first token is in /health and has a log line."""
    load = client.ended({"endpoint": "/health"}).output["load"]
    phases = ["process", "ray", "replica", "device", "resolve", "tokenizer", "read", "warm-up"]
    assert [phase["phase"] for phase in load] == [*phases, "first token", "ready"]
    seconds = {phase["phase"]: phase["seconds"] for phase in load}
    # Processes start in these phases: a time near zero would come from another clock.
    assert all(0.1 < seconds[phase] < 100 for phase in ("process", "ray", "replica"))
    for phase in seconds:
        assert len(re.findall(rf"Cold start: {phase} \d+\.\d s\W", tiny_worker.log)) == 1


def test_ray_starts_no_unneeded_process(client: Client, tiny_worker: Worker) -> None:
    """Ray's dashboard and autoscaler do not run: each costs a second of the cold start."""
    client.ended(PROMPT)
    running = " ".join(descendants(tiny_worker.process.pid).values())
    assert "/raylet" in running
    assert "/dashboard/dashboard.py" not in running
    assert "/autoscaler/" not in running


def test_no_port_takes_calls_from_other_machines(client: Client, tiny_worker: Worker) -> None:
    """Ray's ports refuse each call without the token; the worker has no others."""
    client.ended(PROMPT)
    assert len(listening(tiny_worker.process.pid)) > 3
    assert open_to_strangers(tiny_worker.process.pid) == []


def test_the_banner_says_what_is_served(client: Client, tiny_worker: Worker) -> None:
    """The log has version, model, quantization, volume, GPU, endpoints and limits."""
    log = tiny_worker.log
    for line in (
        "Starting the RunPod worker of mixtral-serve",
        "Model: tiny",
        "Quantization: none",
        "Volume: none is mounted at ",
        "GPU: ",
        "Endpoints: /health, ",
        "/v1/chat/completions, /v1/completions, /v1/responses, /v1/messages, ",
        "GPU memory threshold: ",
        "Prompt limit: ",
        "Concurrency: 96 jobs",
        "Waiting for jobs.",
    ):
        assert line in log
    assert client_api.KEY not in log


def test_the_log_has_each_job(client: Client, tiny_worker: Worker) -> None:
    """A job's lines are JSON with its id, as RunPod's console expects; the load has none."""
    job, failed = client.ended(PROMPT), client.ended({**PROMPT, "temperature": 3})
    lines = [json.loads(line) for line in tiny_worker.log.splitlines() if line.startswith("{")]
    by_job = {line["message"].split(":")[0]: line for line in lines if line["requestId"] == job.id}
    assert list(by_job) == ["Job started", "Job completed"]
    (error,) = (line for line in lines if f"Job failed: {failed.id}" in line["message"])
    assert (error["requestId"], error["level"]) == (failed.id, "ERROR")
    assert "VALIDATION_FAILED: `temperature` is refused" in error["message"]
    assert {line["requestId"] for line in lines if "Cold start" in line["message"]} == {None}


def test_cancelled_before_its_first_token(client: Client, tiny_worker: Worker) -> None:
    """A job cancelled during prefill stops, and its KV blocks are free."""
    num_waiting = client.ended({"endpoint": "/health"}).output["engine"]["running"]
    job = client.submit({"prompt": "ten words " * 4000, "stream": True})

    def is_read() -> bool:
        engine = client.ended({"endpoint": "/health"}).output["engine"]
        return bool(engine["running"] > num_waiting)

    until(is_read)
    client.cancel(job)
    assert (job.status, job.chunks) == ("CANCELLED", [])
    settled(client.platform, tiny_worker)


def test_a_list_of_prompts_posts_progress(client: Client) -> None:
    """A list of prompts posts percentages, then one result that contains a bad item's error."""
    prompts: list[Any] = ["Count.", {"prompt": "Count.", "temperature": 3}, *["Count."] * 30]
    # Lasts ten times as long as the interval of updates.
    job = client.ended({"prompts": prompts, "max_tokens": 600, "ignore_eos": True})
    assert job.status == "COMPLETED", job.error
    results = job.output["results"]
    assert [index for index, result in enumerate(results) if "error" in result] == [1]
    assert job.progress
    for update in job.progress:
        assert update.keys() == {"progress", "message"}
        assert update["message"].endswith("of 32 done")
    assert (job.num_results, job.num_late_posts) == (1, 0)


def test_no_log_has_the_users_words(client: Client, tiny_worker: Worker) -> None:
    """The log holds no word of a prompt, whether it was answered, failed or refused."""
    words = "zebra umbrella"
    client.ended({**PROMPT, "prompt": words})
    client.ended({**PROMPT, "prompt": words, "stream": True})
    client.ended({"prompt": words, "temperature": 2.1})
    client.ended({"prompt": [words]})
    client.ended({"endpoint": f"/{words}", "data": {"prompt": words}})
    client.ended({"openai_input": {"messages": [{"role": words, "content": words}]}})
    assert "zebra" not in tiny_worker.log


def test_every_job_had_one_result(client: Client) -> None:
    """All jobs of this module had one result, cancelled ones none, and no post came after it."""
    client.ended(PROMPT)
    for job in client.platform.queue.jobs.values():
        assert job.num_results == (0 if job.status == "CANCELLED" else 1), job.request
        assert job.status == "CANCELLED" or job.num_late_posts == 0
        assert "Traceback" not in str(job.error)
        assert ".py" not in str(job.error)
