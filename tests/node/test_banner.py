"""The banner of a worker at its start."""

import re
from pathlib import Path
from typing import Literal

import pytest

import serve_app
from serve_app.api.routes import ROUTES
from serve_app.config.settings import Settings
from serve_app.errors import ModelLoadFailed
from serve_app.node.banner import banner, gpu, volume
from tests.mounts import mounted_folder
from tests.nvml import Install


def test_the_banner_has_the_facts_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Version, model, quantization, thresholds and concurrency are there; keys are not."""
    monkeypatch.setenv("API_KEYS", "sk-secret")
    monkeypatch.setenv("HF_TOKEN", "hf-secret")
    args = {"model": {"name": "org/model", "revision": "v2"}}
    settings = Settings.from_args({**args, "engine": {"gpu_memory_utilization": 0.9}}, "test")
    text = "\n".join(banner(settings, "configs/x.yaml", 40, ["Memory: 25 GB of weights."]))
    for fact in (
        serve_app.__version__,
        "configs/x.yaml",
        "org/model at v2",
        "Quantization: nf4",
        "Memory: 25 GB of weights.",
        "GPU memory threshold: 90%",
        "Prompt limit: 100,000 characters",
        "40 jobs, 32 of them",
    ):
        assert fact in text
    assert "secret" not in text
    endpoints = next(line for line in text.splitlines() if line.startswith("Endpoints: "))
    listed = set(endpoints.removeprefix("Endpoints: ").split(", "))
    assert listed == {route.path for route in ROUTES}


@pytest.mark.parametrize(
    ("start", "slots", "failure", "line"),
    [
        ("lazy", 4, None, "The model loads with the first job."),
        ("eager", 4, None, "The model loads now."),
        ("lazy", None, None, "The model loads now."),
        ("eager", 4, ModelLoadFailed("m: is a file."), "The model cannot be loaded: m: is a file."),
    ],
)
def test_the_banner_says_when_the_model_loads(
    start: Literal["lazy", "eager"], slots: int | None, failure: ModelLoadFailed | None, line: str
) -> None:
    """The banner has the time of the load (now, or with the first job), or the reason why the model
    cannot be loaded."""
    settings = Settings(runpod={"start": start})
    assert line in banner(settings, "configs/x.yaml", slots, [], failure)


def test_the_volume_is_named_with_what_it_allows(tmp_path: Path) -> None:
    """A worker without its volume is seen in the first lines; a folder alone is no volume."""
    with mounted_folder() as folder:
        assert re.fullmatch(rf"{folder} is mounted, \d+ GB free; it can be written", volume(folder))
    for folder in (tmp_path, tmp_path / "nothing"):
        assert f"none is mounted at {folder}" in volume(folder)


def test_gpus_are_named_by_nvml(nvml: Install) -> None:
    """One part per GPU; a machine without a driver, or with a broken one, still starts."""
    nvml(("RTX 5090", 32607, 32100), ("B", 1, 0), driver="580.1")
    assert gpu() == "RTX 5090, 32607 MiB, driver 580.1; B, 1 MiB, driver 580.1"
    nvml(failure="Driver Not Loaded")
    assert gpu() == "none (NVML: Driver Not Loaded)"
    nvml()
    assert gpu() == "none (NVML lists none)"
