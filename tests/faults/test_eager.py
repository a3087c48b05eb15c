"""`runpod.start: eager`: the worker loads the model before it takes its first job."""

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from emulator.platform import Platform
from emulator.worker import Worker
from serve_app.tiny import CHECKPOINT
from tests.settled import settled
from tests.worker.conftest import TINY, Client, until

pytestmark = [pytest.mark.faults, pytest.mark.ray]

EAGER: dict[str, Any] = {"MIXTRAL_RUNPOD__START": "eager", "SERVE_CONFIG": str(TINY)}


def test_the_model_is_loaded_before_a_job_is_taken(tmp_path: Path) -> None:
    """The first job finds the model ready; the worker drains on SIGTERM."""
    with Platform() as platform, Worker(platform, tmp_path, **EAGER) as worker:
        client = Client(platform)
        until(lambda: "Cold start: ray" in worker.log)
        waiting = client.submit({"prompt": "What is 2 + 3?", "temperature": 0})
        until(lambda: "Cold start: ready" in worker.log or waiting.is_over)
        assert platform.queue.num_polls == 0
        until(lambda: waiting.is_over)
        job = client.submit({"prompt": "x", "ignore_eos": True, "max_tokens": 1500, "stream": True})
        until(lambda: job.chunks)
        code = worker.terminate()
        settled(platform, worker)
    assert waiting.output["text"] == "2 + 3 = 5."
    assert waiting.progress == []  # there was nothing to wait for
    assert (job.status, job.num_results) == ("COMPLETED", 1)
    assert code == 0


def test_sigterm_while_loading_ends_at_once(tmp_path: Path) -> None:
    """SIGTERM during the load ends the worker with code 0, without a poll."""
    with Platform() as platform, Worker(platform, tmp_path, **EAGER) as worker:
        until(lambda: "Cold start: ray" in worker.log)
        worker.process.send_signal(signal.SIGTERM)
        assert worker.process.wait(60) == 0, worker.log
        assert platform.queue.num_polls == 0
        settled(platform, worker)
    assert "Cold start: ready" not in worker.log


def test_why_it_failed_is_kept_for_the_jobs(tmp_path: Path) -> None:
    """After a load that failed the worker takes jobs, and each fails with the cause."""
    checkpoint = shutil.copytree(CHECKPOINT, tmp_path / "broken")
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.embed_tokens.weight"].fill_(float("nan"))  # no check reads the weights
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    config = yaml.safe_load(TINY.read_text())
    config["applications"][0]["args"]["model"]["name"] = str(checkpoint)
    path = tmp_path / "broken.yaml"
    path.write_text(yaml.safe_dump(config))
    variables = {**EAGER, "SERVE_CONFIG": str(path)}
    with Platform() as platform, Worker(platform, tmp_path, **variables) as worker:
        until(lambda: "The model could not be started" in worker.log)
        job = Client(platform).ended({"prompt": "x"})
        code = worker.terminate()
        settled(platform, worker)
    error = Client(platform).error_of(job)["error"]
    assert (error["status"], error["retry"]) == ("MODEL_LOAD_FAILED", False)
    assert "its first prompt failed" in error["message"]
    assert code == 0
