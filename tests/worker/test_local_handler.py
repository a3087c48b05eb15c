"""`runpod_entry.handler`: jobs answered in scripts and unit tests, as RunPod's guides show."""

import asyncio
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from serve_app.worker import local
from serve_app.worker.local import LogPosts
from serve_app.worker.result import Result
from tests.worker.process import TINY, environment

SCRIPT = """
import json, sys
import warnings; warnings.simplefilter("error")
from runpod_entry import handler
for number, given in enumerate(json.loads(sys.argv[1])):
    print(json.dumps(handler({"id": f"test-{number}", "input": given})))
assert not {"ray", "torch", "runpod", "transformers"} & set(sys.modules)
"""
QUESTION = {"prompt": "What is 2 + 3?", "temperature": 0}
MESSAGES = {"messages": [{"role": "user", "content": "What is 2 + 3?"}], "temperature": 0}


def answers(home: Path, *inputs: object, **more: str) -> "subprocess.CompletedProcess[str]":
    """Runs a script that calls `handler` with each of `inputs`; it prints what was returned."""
    variables = {**environment(home, **more), "PYTHONPATH": str(TINY.parents[1])}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(inputs)],
        cwd=home,
        env=variables,
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.mark.ray
def test_a_script_gets_outputs_and_errors(tmp_path: Path) -> None:
    """Each call returns the output of the job, or its error; the first starts the model."""
    stream, batch = {**QUESTION, "stream": True}, {"items": [], "temperature": 0}
    done = answers(tmp_path, {}, QUESTION, MESSAGES, stream, batch, {**QUESTION, "temperature": 3})
    assert done.returncode == 0, done.stderr
    empty, plain, chat, streamed, listed, refused = map(json.loads, done.stdout.splitlines())
    for failed in (empty, refused):
        assert failed.keys() == {"error", "status", "retry"}
        assert (failed["status"], failed["retry"]) == ("VALIDATION_FAILED", False)
    assert "`temperature`" in refused["error"]
    assert plain["output"]["text"] == chat["output"]["text"] == "2 + 3 = 5."
    assert "".join(chunk["token"] for chunk in streamed["output"]) == "2 + 3 = 5."
    assert listed == {"output": {"results": [], "total_processed": 0}}
    assert done.stderr.count("Cold start: ready") == 1


def test_a_model_that_cannot_load_is_an_error(tmp_path: Path) -> None:
    """If the model cannot be loaded, each job fails with the reason, and nothing is started."""
    done = answers(tmp_path, QUESTION, QUESTION, MODEL_NAME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        failed = json.loads(line)
        assert (failed["status"], failed["retry"]) == ("MODEL_LOAD_FAILED", False)
        assert str(tmp_path) in failed["error"]


def test_a_wrong_configuration_raises(tmp_path: Path) -> None:
    """A wrong setting is in the log, and the call raises instead of waiting."""
    done = answers(tmp_path, QUESTION, MIXTRAL_ENGINE__MAX_LEN="5")
    assert done.returncode == 1
    assert "MIXTRAL_ENGINE__MAX_LEN, which is not a setting" in done.stderr
    assert "RuntimeError: The worker's process ended with code 1" in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_the_output_is_utf_8_on_every_terminal(encoding: str) -> None:
    """A terminal whose encoding lacks the answer's characters gets the answer, which is JSON."""
    written = io.BytesIO()
    out = io.TextIOWrapper(written, encoding)
    local.write(Result('{"text":"5 €"}'.encode()), out)
    assert json.loads(written.getvalue()) == {"text": "5 €"}


def test_each_phase_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """The first updates come before the load log has a phase; they are those of Ray's start."""
    caplog.set_level("INFO")
    posts = LogPosts()
    for update in ({}, {"phase": "ray"}, {"phase": "read"}, {"phase": "read"}):
        asyncio.run(posts.progress(update))
    assert caplog.messages == ["Loading: ray", "Loading: read"]
