"""RUNPOD_SERVERLESS=false as a whole process: what SIGTERM does to those who are being answered."""

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.worker.conftest import until
from tests.worker.process import ENTRY, environment

pytestmark = [pytest.mark.faults, pytest.mark.ray]

LONG = {"prompt": "x", "ignore_eos": True, "max_tokens": 1500, "stream": True}


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def entry(tmp_path: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """The entry point, serving HTTP on `port`, in the folder of the test."""
    variables = environment(tmp_path, RUNPOD_SERVERLESS="false", PORT=str(port))
    variables["MIXTRAL_LOAD_LOG"] = str(tmp_path / "load.jsonl")
    command = [sys.executable, str(ENTRY)]
    with (
        (tmp_path / "entry.log").open("wb") as log,
        subprocess.Popen(command, cwd=tmp_path, env=variables, stderr=log) as process,
    ):
        yield process
        process.kill()


def until_written(entry: subprocess.Popen[bytes], file: Path, words: str) -> None:
    """Until `words` are in `file`, which the entry point or its replica writes."""

    def is_there() -> bool:
        assert entry.poll() is None, "it has ended"
        return file.exists() and words in file.read_text()

    until(is_there, timeout_s=100)


def test_sigterm_while_loading_ends_at_once(entry: subprocess.Popen[bytes], tmp_path: Path) -> None:
    """There is nobody to wait for; Ray's own handler would end it with another code."""
    until_written(entry, tmp_path / "load.jsonl", "device")
    entry.send_signal(signal.SIGTERM)
    assert entry.wait(60) == 0
    assert "Serving HTTP" not in (tmp_path / "entry.log").read_text()


def test_sigterm_lets_a_stream_finish(
    entry: subprocess.Popen[bytes], tmp_path: Path, port: int
) -> None:
    """The stream goes on to its `[DONE]`, who comes meanwhile is sent elsewhere, the exit is 0."""
    until_written(entry, tmp_path / "entry.log", "Serving HTTP")
    http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
    with http, http.stream("POST", "/prompt", json=LONG) as response:
        lines = response.iter_lines()
        next(lines)
        entry.send_signal(signal.SIGTERM)
        until(lambda: http.get("/ping").status_code == 503)
        refused = http.post("/prompt", json={"prompt": "a"})
        events = [line.removeprefix("data: ") for line in lines if line]
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert "retry-after" in refused.headers
    assert events.pop() == "[DONE]"
    assert json.loads(events[-1])["usage"]["completion_tokens"] == LONG["max_tokens"]
    assert entry.wait(60) == 0
