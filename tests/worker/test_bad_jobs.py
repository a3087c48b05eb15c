"""Jobs that cannot be answered as they are."""

import json
from typing import Any

import pytest

from tests.worker.conftest import Client, until

pytestmark = pytest.mark.ray

GREEDY = {"temperature": 0, "max_tokens": 12}
PROMPT = {"prompt": "What is 2 + 3?", **GREEDY}


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
