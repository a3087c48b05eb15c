"""RUNPOD_SERVERLESS=false as a process: its signals, lost processes, and what clients get."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from serve_app.machine.ports import free_port
from tests.faults.conftest import spoil
from tests.listening import open_to_strangers
from tests.processes import all_below, descendants, one_below, replica_of, running
from tests.settled import left_behind
from tests.worker.conftest import until
from tests.worker.process import ENTRY, environment, run_entry

pytestmark = [pytest.mark.faults, pytest.mark.ray]

LONG = {"prompt": "x", "ignore_eos": True, "max_tokens": 5000, "stream": True}


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def port_health() -> int:
    return free_port()


@pytest.fixture
def entry(
    tmp_path: Path, config: Path, port: int, port_health: int
) -> Iterator[subprocess.Popen[bytes]]:
    """The entry point, serving HTTP on `port`, in the folder of the test; nothing of it stays."""
    variables = environment(
        tmp_path,
        RUNPOD_SERVERLESS="false",
        SERVE_CONFIG=str(config),
        PORT=str(port),
        PORT_HEALTH=str(port_health),
        MIXTRAL_LOAD_LOG=str(tmp_path / "load.jsonl"),
    )
    command = [sys.executable, str(ENTRY)]
    with (
        (tmp_path / "entry.log").open("wb") as log,
        subprocess.Popen(command, cwd=tmp_path, env=variables, stderr=log) as process,
    ):
        yield process
        process.kill()
    until(lambda: not left_behind(tmp_path))


def until_written(entry: subprocess.Popen[bytes], file: Path, words: str) -> None:
    """Waits until `words` are in `file`, which the entry point or its replica writes."""

    def is_there() -> bool:
        assert entry.poll() is None, "it has ended"
        return file.exists() and words in file.read_text()

    until(is_there, timeout_s=100)


def ping(port_health: int) -> int | None:
    """Returns the status that a load balancer reads; None if nothing listens."""
    try:
        return httpx.get(f"http://127.0.0.1:{port_health}/ping", timeout=10).status_code
    except httpx.TransportError:
        return None


def test_sigterm_while_loading_ends_at_once(
    entry: subprocess.Popen[bytes], tmp_path: Path, port_health: int
) -> None:
    """A load balancer gets 204 before Ray runs. SIGTERM then ends the process at once, with 0."""
    until(lambda: ping(port_health))
    running_then = " ".join(descendants(entry.pid).values())
    assert (ping(port_health), "/gcs_server" in running_then) == (204, False)
    until_written(entry, tmp_path / "load.jsonl", "device")
    assert ping(port_health) == 204
    health = httpx.get(f"http://127.0.0.1:{port_health}/health")
    assert (health.status_code, health.json()["status"]) == (503, "loading")
    assert health.json()["load"] or health.json()["phase"]
    os.kill(replica_of(entry.pid), signal.SIGSTOP)  # from now on the load would take for ever
    entry.send_signal(signal.SIGTERM)
    assert entry.wait(60) == 0
    log = (tmp_path / "entry.log").read_text()
    assert "Serving HTTP" not in log
    assert "Controller failed to shut down" not in log  # Serve's farewell waits for the load


def test_sigterm_lets_a_stream_finish(
    entry: subprocess.Popen[bytes], tmp_path: Path, port: int, port_health: int
) -> None:
    """A stream runs to its `[DONE]`, new requests get 503, and the exit code is 0.

    No other port than the two that are meant for clients takes a call from another machine.
    """
    until_written(entry, tmp_path / "entry.log", "Serving HTTP")
    assert ping(port_health) == 200
    assert set(open_to_strangers(entry.pid)) == {("0.0.0.0", port), ("0.0.0.0", port_health)}
    http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
    with http, http.stream("POST", "/prompt", json=LONG) as response:
        lines = response.iter_lines()
        next(lines)
        entry.send_signal(signal.SIGTERM)
        until(lambda: http.get("/ping").status_code == 503)
        assert ping(port_health) == 503
        refused = http.post("/prompt", json={"prompt": "a"})
        events = [line.removeprefix("data: ") for line in lines if line]
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert "retry-after" in refused.headers
    assert events.pop() == "[DONE]"
    assert json.loads(events[-1])["usage"]["completion_tokens"] == LONG["max_tokens"]
    assert entry.wait(60) == 0


def test_sigterm_waits_for_a_slow_reader(
    entry: subprocess.Popen[bytes], tmp_path: Path, port: int
) -> None:
    """An answer that is complete on the server reaches a client that reads late, whole."""
    until_written(entry, tmp_path / "entry.log", "Serving HTTP")
    # More than the kernel keeps for a client that reads nothing.
    body = {"prompt": ["x"] * 200, "max_tokens": 100, "logprobs": 5, "ignore_eos": True}
    with (
        httpx.Client(timeout=60) as http,
        http.stream("POST", f"http://127.0.0.1:{port}/v1/completions", json=body) as response,
    ):
        parts = response.iter_raw()
        num_read = len(next(parts))
        entry.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            entry.wait(3)
        num_read += sum(map(len, parts))
    assert num_read == int(response.headers["content-length"])
    assert entry.wait(60) == 0


def test_a_model_that_does_not_load_again_ends_it(
    entry: subprocess.Popen[bytes], tmp_path: Path, checkpoint: Path, port_health: int
) -> None:
    """The replica dies and its successor cannot load: the log has the cause, the exit code is 1."""
    until_written(entry, tmp_path / "entry.log", "Serving HTTP")
    spoil(checkpoint)
    os.kill(replica_of(entry.pid), signal.SIGKILL)
    answers: set[int | None] = set()

    def has_ended() -> bool:
        answers.add(ping(port_health))
        return entry.poll() is not None

    until(has_ended)
    assert entry.returncode == 1
    assert {204, 503} & answers, "the load balancer was not informed"
    errors = [line for line in (tmp_path / "entry.log").read_text().splitlines() if "ERROR" in line]
    assert "special tokens cannot be read" in errors[-1]


@pytest.mark.parametrize("victim", ["/raylet ", "/gcs_server "])
def test_it_ends_with_ray(
    entry: subprocess.Popen[bytes], tmp_path: Path, port_health: int, victim: str
) -> None:
    """Serve cannot repair this: the exit code is 1, so that a new container starts."""
    until_written(entry, tmp_path / "entry.log", "Serving HTTP")
    left = all_below(entry.pid)
    os.kill(one_below(entry.pid, victim), signal.SIGKILL)
    assert entry.wait(60) == 1
    assert "The server ends: Ray's" in (tmp_path / "entry.log").read_text()
    assert not left & running()


def test_it_ends_when_the_model_cannot_load(tmp_path: Path, config: Path, checkpoint: Path) -> None:
    """The cause is the last line of the log, and the exit code is 1."""
    spoil(checkpoint)
    done = run_entry(tmp_path, SERVE_CONFIG=str(config), RUNPOD_SERVERLESS="false", PORT="0")
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if " ERROR " in line]
    assert "special tokens cannot be read" in errors[-1]
    until(lambda: not left_behind(tmp_path))
