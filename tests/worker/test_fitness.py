"""An unfit machine ends its worker as unhealthy; a model that cannot load does not.

The SDK of a whole worker runs the checks and ends the process. No test starts Ray.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from emulator.platform import Platform
from emulator.worker import Worker
from serve_app.tiny import CHECKPOINT
from tests import nvml
from tests.worker.conftest import TINY, Client, until
from tests.worker.process import ENTRY


def config(folder: Path, **model: Any) -> str:
    """Writes configs/tiny.yaml with other `model` settings. Returns its path."""
    document = yaml.safe_load(TINY.read_text())
    document["applications"][0]["args"]["model"] |= model
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(document))
    return str(path)


def with_gpu(folder: Path, gpu: nvml.Row, driver: str, cuda: str) -> dict[str, str]:
    """Returns the environment of a machine whose NVML lists `gpu`, and whose torch is for
    `cuda`."""
    (folder / "site" / "torch").mkdir(parents=True)
    (folder / "site" / "torch" / "__init__.py").touch()
    (folder / "site" / "torch" / "version.py").write_text(f"cuda = '{cuda}'\n")
    nvml.write(folder / "site", gpu, driver=driver)
    return {"PYTHONPATH": f"{folder / 'site'}:{ENTRY.parent}"}


@pytest.mark.parametrize("fault", ["gpu_driver", "gpu_memory", "model_folder"])
def test_an_unfit_machine_is_reported(tmp_path: Path, fault: str) -> None:
    """An unfit machine is one log line, an unhealthy ping with the check, and exit code 1."""
    variables: dict[str, Any] = {}
    if fault.startswith("gpu"):
        driver, size = ("550.1", 32000) if fault == "gpu_driver" else ("580.1", 1200)
        variables = with_gpu(tmp_path, ("RTX 5090", size, size), driver, "13.0")
        path = config(tmp_path, device="cuda")
    else:
        path = config(tmp_path, name="/runpod-volume/absent/model")
    sentences = {
        "gpu_driver": "RTX 5090 has driver 550.1, and this image's CUDA 13.0 needs 580",
        "gpu_memory": "RTX 5090 has 1.26 GB free",
        "model_folder": "/runpod-volume/absent/model: the volume /runpod-volume is not mounted",
    }
    with Platform() as platform, Worker(platform, tmp_path, SERVE_CONFIG=path, **variables) as one:
        assert one.process.wait(60) == 1
        unhealthy = [ping for ping in platform.queue.pings if ping.get("status") == "unhealthy"]
    assert [ping["check"] for ping in unhealthy] == [fault]
    assert sentences[fault] in unhealthy[0]["reason"]
    (line,) = [line for line in one.log.splitlines() if f"Fitness check failed: {fault}" in line]
    assert sentences[fault] in line
    assert "Traceback" not in one.log


def test_a_broken_checkpoint_fails_the_jobs(tmp_path: Path) -> None:
    """A checkpoint that the check finds broken fails every job at once; the worker goes on."""
    checkpoint = shutil.copytree(CHECKPOINT, tmp_path / "broken")
    (checkpoint / "tokenizer.json").unlink()
    path = config(tmp_path, name=str(checkpoint))
    with Platform() as platform, Worker(platform, tmp_path, SERVE_CONFIG=path) as worker:
        client = Client(platform)
        jobs = [client.submit({"prompt": "x"}) for _ in range(2)]
        until(lambda: all(job.is_over for job in jobs))
        health = client.ended({"endpoint": "/health"}).output
        code = worker.terminate()
    for job in jobs:
        error = client.error_of(job)["error"]
        assert (error["status"], error["retry"]) == ("MODEL_LOAD_FAILED", False)
        assert error["message"].startswith(f"{checkpoint / 'tokenizer.json'}: is missing, ")
        assert (job.num_results, job.progress) == (1, [])
    assert (health["status"], health["reason"]) == ("failed", error["message"])
    assert code == 0
    assert "Cold start: ray" not in worker.log
