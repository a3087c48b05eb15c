"""GPUs, drivers and CUDA, from NVML and torch's version file."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from serve_app.machine.gpus import (
    MIB,
    Gpu,
    NoGpus,
    driver_problem,
    find_gpus,
    query_gpus,
    torch_cuda_version,
)
from tests.nvml import RTX_4090, RTX_5090, Install


def test_the_gpus_are_those_that_nvml_lists(nvml: Install) -> None:
    """Name, memory and driver of each; a GPU that reports no size has 0 bytes."""
    module = nvml(RTX_5090, ("NVIDIA GB10", None, None), driver="580.1")
    assert query_gpus() == [
        Gpu("NVIDIA GeForce RTX 5090", 32607 * MIB, 32100 * MIB, "580.1"),
        Gpu("NVIDIA GB10", 0, 0, "580.1"),
    ]
    assert not module.is_open  # the driver is released


def test_the_instances_of_a_divided_gpu_are_listed(nvml: Install) -> None:
    """Each MIG instance has its own memory; a divided GPU of which a process may ask nothing has
    0 bytes."""
    instance = ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", 40448, 40000)
    nvml(("NVIDIA H100 80GB HBM3", 81559, 1, (instance,) * 2), ("NVIDIA A100", 81920, 1, ()))
    assert query_gpus() == [
        *[Gpu(instance[0], 40448 * MIB, 40000 * MIB, "580.65.06")] * 2,
        Gpu("NVIDIA A100", 0, 0, "580.65.06"),
    ]


def test_the_gpus_are_listed_once(nvml: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver may take seconds to answer, so the first answer is kept."""
    module = nvml(RTX_4090)
    first = query_gpus()
    monkeypatch.setattr(module, "GPUS", ())
    assert query_gpus() is first


def test_no_gpu_has_a_reason(nvml: Install) -> None:
    """NVML's own words where it fails, ours where it lists none."""
    nvml(failure="Driver Not Loaded")
    with pytest.raises(NoGpus, match=r"^NVML: Driver Not Loaded$"):
        query_gpus()
    assert find_gpus() == []
    nvml()
    with pytest.raises(NoGpus, match=r"^NVML lists none$"):
        query_gpus()


def test_the_fake_has_names_of_the_real_library(nvml: Install) -> None:
    """Every function and error of the fake exists in nvidia-ml-py."""
    fake = nvml()
    names = [name for name in vars(fake) if name.lower().startswith("nvml")]
    del sys.modules["pynvml"]
    real = importlib.import_module("pynvml")
    assert [name for name in names if not hasattr(real, name)] == []
    assert issubclass(real.NVMLError_NotSupported, real.NVMLError)
    assert len(names) == 15


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a driver")
def test_a_machine_without_a_driver_has_no_gpu() -> None:
    """The real library says that it is not there."""
    with pytest.raises(NoGpus, match=r"^NVML: "):
        query_gpus()


@pytest.mark.parametrize(
    ("driver", "cuda", "minimum"),
    [
        ("570.86.10", "13.0", 580),
        ("580.65.06", "13.0", None),
        ("520.61.05", "12.6", 525),
        ("535.54", "12.6", None),
        ("[N/A]", "13.0", None),
        ("400.1", "99.0", None),
    ],
)
def test_an_old_driver_is_named_with_what_is_needed(
    driver: str, cuda: str, minimum: int | None
) -> None:
    """The refusal is one sentence with both versions; an unknown version is not refused."""
    problem = driver_problem(Gpu("RTX 5090", 1, 1, driver), cuda)
    if minimum is None:
        assert problem is None
    else:
        assert problem is not None
        assert f"has driver {driver}, and this image's CUDA {cuda} needs {minimum}" in problem


def test_torchs_cuda_is_read_from_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The version of the installed torch is found, and that of a build for a GPU."""
    assert torch_cuda_version() == torch.version.cuda
    monkeypatch.delitem(sys.modules, "torch")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert torch_cuda_version() is None
    version = tmp_path / "torch" / "version.py"
    version.write_text("__version__ = '2.13.0'\ncuda: Optional[str] = '13.0'\nhip = None\n")
    assert torch_cuda_version() == "13.0"
