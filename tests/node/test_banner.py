"""What a worker says about itself when it starts."""

from pathlib import Path

import pytest

import serve_app
from serve_app.api.routes import PATHS
from serve_app.config.settings import Settings
from serve_app.node.banner import banner, gpu, volume


def test_the_banner_has_the_facts_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Version, model, quantisation, thresholds and concurrency are there; keys are not."""
    monkeypatch.setenv("API_KEYS", "sk-secret")
    monkeypatch.setenv("HF_TOKEN", "hf-secret")
    args = {"model": {"name": "org/model", "revision": "v2"}}
    settings = Settings.from_args({**args, "engine": {"gpu_memory_utilization": 0.9}}, "test")
    text = "\n".join(banner(settings, "configs/x.yaml", 40, ["Memory: 25 GB of weights."]))
    for fact in (
        serve_app.__version__,
        "configs/x.yaml",
        "org/model at v2",
        "Quantisation: nf4",
        "Memory: 25 GB of weights.",
        "90% of GPU memory",
        "100,000 characters",
        "40 jobs, 32 of them",
    ):
        assert fact in text
    assert "secret" not in text
    endpoints = next(line for line in text.splitlines() if line.startswith("Endpoints: "))
    told = set(endpoints.removeprefix("Endpoints: ").split(", "))
    assert told == set(PATHS) - {"/ping", "/v1/models/{id:path}"}


def test_the_volume_is_named_with_what_it_allows(tmp_path: Path) -> None:
    """A worker without its volume, or with one it cannot write, is seen in the first lines."""
    assert "present and writable" in volume(str(tmp_path))
    assert "not mounted" in volume(str(tmp_path / "nothing"))


def test_gpus_are_named_by_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One part per GPU; a machine without the program, or with a broken one, still starts."""
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu() == "none (no nvidia-smi)"
    rows = "RTX 5090, 32607, 32100, 580.1\nB, 1, [N/A], 580.1"
    program.write_text(f"#!/bin/sh\necho '{rows}'\n")
    program.chmod(0o755)
    assert gpu() == "RTX 5090, 32607 MiB, driver 580.1; B, 1 MiB, driver 580.1"
    program.write_text("#!/bin/sh\nexit 9\n")
    assert gpu() == "none (nvidia-smi: exit 9)"
    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed.'\nexit 9\n")
    assert gpu() == "none (nvidia-smi: NVIDIA-SMI has failed.)"
    program.write_text("#!/bin/sh\nexit 0\n")
    assert gpu() == "none (nvidia-smi lists none)"
