"""RunPod's own client, unmodified, with a worker that has the tiny model."""

import os
from typing import Any

import pytest

from emulator import client_api
from emulator.platform import Platform
from emulator.queue import Job
from emulator.worker import Worker
from tests.settled import settled
from tests.worker.conftest import Client, until

pytestmark = pytest.mark.ray

GREEDY = {"temperature": 0, "max_tokens": 12}
PROMPT = {"prompt": "What is 2 + 3?", **GREEDY}
MESSAGES = [{"role": "user", "content": "What is 2 + 3?"}]


@pytest.fixture(scope="module")
def endpoint(tiny_platform: Platform, first_jobs: list[Job]) -> Any:
    """RunPod's Python client, with the emulator's URL set as its documentation says."""
    os.environ.setdefault("RUNPOD_LOG_LEVEL", "ERROR")  # read when the SDK is imported
    import runpod

    runpod.endpoint_url_base = f"{tiny_platform.url}/v2"
    return runpod.Endpoint("ep", api_key=client_api.KEY)


def text_of(chunks: list[dict[str, Any]]) -> str:
    return "".join(chunk["token"] for chunk in chunks)


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


def run_with_retry(endpoint: Any, given: dict[str, Any], max_tries: int = 3) -> tuple[Any, int]:
    """Returns the retry loop of RunPod guides; the last result and the number of tries."""
    result = None
    for num_tries in range(1, max_tries + 1):
        result = endpoint.run_sync(given, timeout=60)
        if not result.get("retry"):
            return result, num_tries
    return result, max_tries


def test_the_retry_loop_of_guides_works(endpoint: Any) -> None:
    """`result.get("retry")` is false for an answer and for a refusal: neither runs again."""
    answered, num_tries = run_with_retry(endpoint, PROMPT)
    assert (answered["text"], num_tries) == ("2 + 3 = 5.", 1)
    refused, num_tries = run_with_retry(endpoint, {**PROMPT, "temperature": 3})
    assert (refused["status"], num_tries) == ("VALIDATION_FAILED", 1)


def test_a_job_that_does_not_ask_for_a_stream_has_no_chunks(endpoint: Any) -> None:
    """Without `stream: true` there is nothing to stream, and the output is the answer."""
    job = endpoint.run(PROMPT)
    assert list(job.stream()) == []
    assert job.output().keys() == {"text", "finish_reason", "usage", "model"}


def test_a_list_of_prompts_has_a_result_for_each(endpoint: Any) -> None:
    """Results are objects, in the order of the prompts; an empty list has none."""
    output = endpoint.run_sync({"items": ["What is 2 + 3?", {"prompt": ""}], **GREEDY}, timeout=60)
    answered, refused = output["results"]
    assert answered.keys() == {"text", "finish_reason", "usage"}
    assert refused["error"]["param"] == "prompt"
    assert output["total_processed"] == 2
    empty = endpoint.run_sync({"input": {"items": []}}, timeout=60)
    assert empty == {"results": [], "total_processed": 0}


REFUSED = [
    ({"prompt": "x", "messages": MESSAGES}, "messages"),
    ({"prompt": "x", "refresh_worker": True}, "refresh_worker"),
    ({"prompt": "x", "apply_chat_template": False}, "apply_chat_template"),
    ({"items": ["x"], "stream": True}, "stream"),
]


@pytest.mark.parametrize(("given", "field"), REFUSED)
def test_what_guides_show_and_is_refused_is_named(client: Client, given: Any, field: str) -> None:
    """A job that asks for something else than what happens here fails with the field's name."""
    assert client.error_of(client.ended(given))["error"]["param"] == field


def test_what_guides_show_and_changes_nothing_passes(client: Client) -> None:
    """Fields of older workers that ask for what happens anyway pass."""
    more = {"refresh_worker": False, "apply_chat_template": True, "max_batch_size": 50}
    job = client.ended({**PROMPT, **more})
    assert job.output["text"] == "2 + 3 = 5."
    stream = client.ended({**PROMPT, "stream": True}).output
    assert stream[-1]["usage"].keys() == {"prompt_tokens", "completion_tokens", "total_tokens"}
