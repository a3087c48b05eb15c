"""A machine that cannot serve ends its worker as unhealthy; a model that cannot load does not.

Whole workers against the loopback platform: the SDK itself runs the checks, and ends the process.
None of them starts Ray.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.errors import MachineUnfit, ModelLoadFailed
from serve_app.settings import Settings
from serve_app.tiny import CHECKPOINT
from serve_app.worker import fitness
from tests.emulator.platform import Platform
from tests.emulator.worker import Worker
from tests.worker.conftest import TINY, Client, until
from tests.worker.process import ENTRY


def config(folder: Path, **model: Any) -> str:
    """configs/tiny.yaml with another model."""
    document = yaml.safe_load(TINY.read_text())
    document["applications"][0]["args"]["model"] |= model
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(document))
    return str(path)


def with_gpu(folder: Path, row: str, cuda: str) -> dict[str, str]:
    """The environment of a machine whose nvidia-smi prints `row`, and whose torch is for `cuda`."""
    (folder / "bin").mkdir()
    program = folder / "bin" / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{row}'\n")
    program.chmod(0o755)
    (folder / "site" / "torch").mkdir(parents=True)
    (folder / "site" / "torch" / "__init__.py").touch()
    (folder / "site" / "torch" / "version.py").write_text(f"cuda = '{cuda}'\n")
    return {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": f"{folder / 'site'}:{ENTRY.parent}",
    }


@pytest.mark.parametrize("fault", ["gpu_driver", "gpu_memory", "model_folder", "volume"])
def test_an_unfit_machine_is_reported(tmp_path: Path, fault: str) -> None:
    """One sentence in the log, the check's name and reason on the platform, exit code 1."""
    variables: dict[str, Any] = {}
    if fault.startswith("gpu"):
        driver, size = ("550.1", 32000) if fault == "gpu_driver" else ("580.1", 1200)
        variables = with_gpu(tmp_path, f"RTX 5090, {size}, {size}, {driver}", "13.0")
        path = config(tmp_path, device="cuda")
    elif fault == "model_folder":
        path = config(tmp_path, name="/runpod-volume/absent/model")
    else:
        path = config(tmp_path, quantization="nf4", cache_dir="/proc/cache")
    sentences = {
        "gpu_driver": "RTX 5090 has driver 550.1, and this image's CUDA 13.0 needs 580",
        "gpu_memory": "RTX 5090 has 1.26 GB free",
        "model_folder": "/runpod-volume/absent/model: the volume /runpod-volume is not mounted",
        "volume": "`model.cache_dir`: /proc cannot be written",
    }
    with Platform() as platform, Worker(platform, tmp_path, SERVE_CONFIG=path, **variables) as one:
        assert one.process.wait(60) == 1
        told = [ping for ping in platform.queue.pings if ping.get("status") == "unhealthy"]
    assert [ping["check"] for ping in told] == [fault]
    assert sentences[fault] in told[0]["reason"]
    (line,) = [line for line in one.log.splitlines() if f"Fitness check failed: {fault}" in line]
    assert sentences[fault] in line
    assert "Traceback" not in one.log


def test_a_broken_checkpoint_is_for_the_jobs_to_hear(tmp_path: Path) -> None:
    """The worker that finds it before Ray starts lives on, and answers each job at once."""
    checkpoint = shutil.copytree(CHECKPOINT, tmp_path / "broken")
    (checkpoint / "tokenizer.json").unlink()
    path = config(tmp_path, name=str(checkpoint))
    with Platform() as platform, Worker(platform, tmp_path, SERVE_CONFIG=path) as worker:
        client = Client(platform)
        jobs = [client.submit({"prompt": "x"}) for _ in range(2)]
        until(lambda: all(job.is_over for job in jobs))
        health = client.ended({"endpoint": "/health"}).output[0]
        code = worker.terminate()
    for job in jobs:
        error = client.error_of(job)["error"]
        assert (error["status"], error["retry"]) == ("MODEL_LOAD_FAILED", False)
        assert error["message"] == f"{checkpoint / 'tokenizer.json'}: is missing."
        assert (job.num_results, job.progress) == (1, [])
    assert (health["status"], health["reason"]) == ("failed", error["message"])
    assert code == 0
    assert "Cold start: ray" not in worker.log


def test_shared_memory_and_disk_must_have_room(tmp_path: Path) -> None:
    """Each says how much is free and how much is needed; enough of it is no problem."""
    fitness.require_shared_memory(tmp_path, 1)
    fitness.require_disk(tmp_path, 1)
    with pytest.raises(MachineUnfit, match=r"MB free and Ray needs 1000000 MB.*--shm-size"):
        fitness.require_shared_memory(tmp_path, 10**12)
    with pytest.raises(MachineUnfit, match="has 0 MB free"):
        fitness.require_shared_memory(tmp_path / "absent", 1)
    with pytest.raises(MachineUnfit, match=r"is full: .* needs 1000000 MB"):
        fitness.require_disk(tmp_path, 10**12)


def test_a_load_onto_a_gpu_needs_main_memory() -> None:
    """Libraries and weights on their way; a model for the CPU is planned elsewhere."""
    on_gpu = Settings.from_args({"model": {"name": "tiny", "device": "cuda"}}, "test")
    fitness.require_memory(on_gpu, 1)
    with pytest.raises(MachineUnfit, match=r"GB of main memory are free, .* about 1000000 GB"):
        fitness.require_memory(on_gpu, 10**15)
    fitness.require_memory(Settings.from_args({"model": {"name": "tiny"}}, "test"), 10**15)


def test_a_gpu_that_is_not_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nvidia-smi's own words are in the sentence; a model for the CPU does not ask it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    on_gpu = Settings.from_args({"model": {"name": "tiny", "device": "cuda"}}, "test")
    with pytest.raises(MachineUnfit, match=r"none is seen \(no nvidia-smi\)"):
        fitness.require_driver(on_gpu)
    fitness.require_driver(Settings.from_args({"model": {"name": "tiny"}}, "test"))


def test_a_model_that_cannot_load_is_no_fault_of_the_machine() -> None:
    """A wrong name passes the checks, and what the check found of the machine fails them."""
    tiny = Settings.from_args({"model": {"name": "tiny", "device": "cpu"}}, "test")
    assert fitness.first_problem(fitness.checks(tiny, ModelLoadFailed("gated"))) is None
    unfit = MachineUnfit("The GPU is too small.", check="gpu_memory")
    found = fitness.checks(tiny, unfit)
    assert fitness.first_problem(found) is unfit
    assert found[-1].__name__ == "gpu_memory"
