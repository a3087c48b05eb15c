"""Every example runs as its docstring says, with unmodified clients, against the emulator."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from emulator import client_api
from emulator.platform import Platform
from emulator.worker import Worker
from tests.worker.conftest import Client, until

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPT = Path(__file__).with_name("scripted_worker.py")

Start = Callable[..., "subprocess.Popen[str]"]


def start(platform: Platform, home: Path, name: str, *arguments: str) -> "subprocess.Popen[str]":
    """Starts `python examples/NAME.py` with the three variables that its first lines ask for."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "RUNPOD_API_KEY": client_api.KEY,
        "RUNPOD_ENDPOINT_ID": "ep",
        "RUNPOD_ENDPOINT_BASE_URL": f"{platform.url}/v2",
    }
    return subprocess.Popen(
        [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py"), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output_of(example: "subprocess.Popen[str]") -> str:
    """Returns the example's standard output; fails if its exit code is not 0."""
    out, err = example.communicate(timeout=60)
    assert example.returncode == 0, err
    return out


def test_the_engine_example() -> None:
    """The engine alone answers each prompt."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / "engine.py")],
        cwd=EXAMPLES.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "What is 2 + 3?  ->  2 + 3 = 5.\n" in done.stdout
    assert "What is the capital of France?  ->  The capital of France is Paris.\n" in done.stdout


@pytest.mark.ray
def test_the_examples_with_a_loaded_model(client: Client, tmp_path: Path) -> None:
    """Every example prints its answer. They run at once, as importing the clients takes longest."""
    platform = client.platform
    run = start(platform, tmp_path, "run", "What is the capital of France?")
    stream = start(platform, tmp_path, "stream", "What is 2 + 3?")
    chat = start(platform, tmp_path, "openai_chat", "What is the capital of France?")
    cancel = start(platform, tmp_path, "cancel")
    assert output_of(run) == "The capital of France is Paris.\n"
    assert output_of(stream) == "2 + 3 = 5.\n"
    assert output_of(chat) == "The capital of France is Paris.\n"
    assert output_of(cancel).endswith("\nCANCELLED\n")
    engine = client.ended({"endpoint": "/health"}).output["engine"]
    assert (engine["running"], engine["kv_blocks_used"]) == (0, 0)


@pytest.mark.ray
def test_the_progress_example(client: Client, tmp_path: Path) -> None:
    """The progress example prints percentages, then each prompt with its answer."""
    prompts = [f"What is {n} + 1?" for n in range(1, 9)] * 100
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    lines = output_of(start(client.platform, tmp_path, "progress", str(tmp_path / "prompts.txt")))
    updates = [line for line in lines.splitlines() if " %  " in line]
    assert updates
    assert all(line.endswith(f" of {len(prompts)} done") for line in updates)
    answers = lines.splitlines()[len(updates) :]
    assert [answer.split("  ->  ")[0] for answer in answers] == prompts
    assert "What is 2 + 1?  ->  2 + 1 = 3." in answers


def test_the_retry_example(tmp_path: Path) -> None:
    """A job that fails with `retry: true` is sent again; one with `false` ends it at once."""
    with (
        Platform() as platform,
        Worker(platform, tmp_path, script=SCRIPT) as worker,
    ):
        until(lambda: platform.queue.num_polls)
        flaky = start(platform, tmp_path, "retry", "flaky")
        refused = start(platform, tmp_path, "retry", "refused")
        out, err = flaky.communicate(timeout=60)
        assert (flaky.returncode, out) == (0, "flaky\n"), worker.log
        assert "Try 1: CONNECTION_ERROR: The model's process has ended" in err
        assert "Try 2" not in err
        _, err = refused.communicate(timeout=60)
        assert refused.returncode == 1
        assert err.endswith("The same job would fail again.\n")
        assert len(platform.queue.jobs) == 3
