"""Whole paths: unmodified clients, the platform on loopback, the real SDK, Ray, the tiny model."""

import json
import os
import re
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from emulator import client_api
from emulator.platform import Platform
from emulator.queue import Job
from emulator.worker import Worker
from tests.processes import descendants
from tests.settled import settled
from tests.worker.conftest import Client, until

pytestmark = pytest.mark.ray

GREEDY = {"temperature": 0, "max_tokens": 12}
PROMPT = {"prompt": "What is 2 + 3?", **GREEDY}
MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is 2 + 3?"}]


@pytest.fixture(scope="module")
def endpoint(tiny_platform: Platform, first_jobs: list[Job]) -> Any:
    """RunPod's Python client, with the emulator's URL set as its documentation says."""
    os.environ.setdefault("RUNPOD_LOG_LEVEL", "ERROR")  # read when the SDK is imported
    import runpod

    runpod.endpoint_url_base = f"{tiny_platform.url}/v2"
    return runpod.Endpoint("ep", api_key=client_api.KEY)


@pytest.fixture(scope="module")
def gateway(tiny_platform: Platform, first_jobs: list[Job]) -> openai.OpenAI:
    """OpenAI's Python client, with the gateway's URL."""
    url = f"{tiny_platform.url}/v2/ep/openai/v1"
    return openai.OpenAI(base_url=url, api_key=client_api.KEY, max_retries=0, timeout=60)


def text_of(chunks: list[dict[str, Any]]) -> str:
    return "".join(chunk["token"] for chunk in chunks)


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


def test_the_banner_says_what_is_served(client: Client, tiny_worker: Worker) -> None:
    """The log has version, model, quantization, volume, GPU, endpoints and limits."""
    log = tiny_worker.log
    for line in (
        "Starting the RunPod worker of mixtral-serve",
        "Model: tiny",
        "Quantization: none",
        "Volume: /runpod-volume",
        "GPU: ",
        "Endpoints: /health, ",
        "/v1/chat/completions, /v1/completions, /prompt",
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


def test_the_runpod_client_runs_and_waits(endpoint: Any) -> None:
    """`run` with polling and `run_sync` give the same output."""
    job = endpoint.run(PROMPT)
    assert job.output(timeout=60) == endpoint.run_sync(PROMPT, timeout=60)
    assert job.status() == "COMPLETED"


def test_the_runpod_client_streams(endpoint: Any) -> None:
    """A stream has the text of the plain answer, and the job's output keeps all of its chunks."""
    whole = endpoint.run_sync(PROMPT, timeout=60)
    job = endpoint.run({**PROMPT, "stream": True})
    chunks = list(job.stream())
    assert text_of(chunks) == whole["text"]
    assert chunks[-1]["finished"]
    assert chunks[-1]["usage"] == whole["usage"]
    assert job.output() == chunks


def test_the_runpod_client_reads_whether_to_retry(endpoint: Any) -> None:
    """The client hides a failed job's error; the output has its `status`, `retry`, `message`."""
    output = endpoint.run_sync({**PROMPT, "temperature": 3}, timeout=60)
    assert output.keys() == {"status", "retry", "message"}
    assert (output["status"], output.get("retry")) == ("VALIDATION_FAILED", False)
    assert "`temperature`" in output["message"]


def test_the_runpod_client_cancels(endpoint: Any, client: Client, tiny_worker: Worker) -> None:
    """A cancelled stream stops, and its KV blocks are free."""
    body = {"prompt": "x", "stream": True, "max_tokens": 16_000, "ignore_eos": True}
    job = endpoint.run(body)
    record = client.platform.queue.jobs[job.job_id]
    until(lambda: record.chunks)
    job.cancel()
    settled(client.platform, tiny_worker)
    assert (job.status(), record.num_results) == ("CANCELLED", 0)


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
    """A list of prompts posts percentages, then one result with a bad item's error in its place."""
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


def test_the_openai_client_chats(gateway: openai.OpenAI) -> None:
    """A plain and a streamed chat answer have the same text and usage."""
    whole = gateway.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, max_tokens=12
    )
    stream = gateway.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        temperature=0,
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


def test_the_openai_client_completes_and_lists_models(gateway: openai.OpenAI) -> None:
    """The gateway serves GET routes and `/v1/completions`."""
    assert [model.id for model in gateway.models.list()] == ["tiny"]
    assert gateway.models.retrieve("tiny").id == "tiny"
    whole = gateway.completions.create(model="tiny", prompt="2 + 3", temperature=0, max_tokens=5)
    assert whole.usage is not None
    assert whole.usage.completion_tokens <= 5


def test_the_openai_client_raises_errors(gateway: openai.OpenAI) -> None:
    """A refused request raises in the client with the field's name, streamed or not."""
    with pytest.raises(openai.BadRequestError) as caught:
        gateway.chat.completions.create(model="tiny", messages=MESSAGES, temperature=2.1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.APIError) as streamed:
        list(
            gateway.chat.completions.create(
                model="tiny", messages=MESSAGES, temperature=2.1, stream=True
            )
        )
    assert streamed.value.param == "temperature"


BAD: list[tuple[Any, str | None]] = [
    (None, "input"),
    ({}, "input"),
    ("text", "input"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": "x", "temperature": 2.1}, "temperature"),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "x", "colour": "red"}, "colour"),
    ({"prompt": "x" * 100_001}, "prompt"),
    ({"prompt": "x", "model": "gpt"}, "model"),
    ({"prompts": ["a"], "stream": True}, "stream"),
    ({"route": "/nowhere", "body": {"a": 1}}, None),
    ({"route": "/prompt", "method": "DELETE"}, None),
]


@pytest.mark.parametrize(("given", "param"), BAD)
def test_bad_jobs_say_what_to_change(client: Client, given: Any, param: str | None) -> None:
    """A bad job is refused with the field's name, without a traceback or a file name."""
    job = client.ended(given)
    assert job.status == "FAILED"
    error = json.loads(job.error)["error"]
    assert (error["status"], error["retry"]) == ("VALIDATION_FAILED", False)
    assert error["param"] == param
    assert "Traceback" not in job.error
    assert ".py" not in job.error


def test_jobs_without_input_in_a_batch_are_answered(client: Client) -> None:
    """A job without `input` fails alone; the others of its batch are answered."""
    with client.platform.paused():
        jobs = [client.post({}), client.submit(PROMPT), client.submit(None)]
    until(lambda: all(job.is_over for job in jobs))
    assert [job.status for job in jobs] == ["FAILED", "COMPLETED", "FAILED"]


def test_surrogates_come_back_as_text(client: Client) -> None:
    """A job with a lone surrogate is answered or refused, never lost."""
    job = client.ended({"prompt": "a\ud800b", "model": "\ud800"})
    assert job.status == "FAILED"
    assert json.loads(job.error)["error"]["status"] == "VALIDATION_FAILED"


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
