"""Each check of the machine passes with enough, and fails with one sentence with too little."""

import resource
from pathlib import Path

import pytest

from serve_app.config.settings import Settings
from serve_app.errors import MachineUnfit, ModelLoadFailed
from serve_app.node import fitness
from tests.nvml import Install


def test_shared_memory_and_disk_must_have_room(tmp_path: Path) -> None:
    """An error has the free and the needed amount; enough memory and disk raise none."""
    fitness.require_shared_memory(tmp_path, 1)
    fitness.require_disk(tmp_path, 1)
    with pytest.raises(MachineUnfit, match=r"MB free, but Ray needs 1000000 MB.*--shm-size"):
        fitness.require_shared_memory(tmp_path, 10**12)
    with pytest.raises(MachineUnfit, match="has 0 MB free"):
        fitness.require_shared_memory(tmp_path / "absent", 1)
    with pytest.raises(MachineUnfit, match=r"is full: .* needs 1000000 MB"):
        fitness.require_disk(tmp_path, 10**12)


def test_open_files_must_be_enough() -> None:
    """An error has the limit, the needed number, and how to raise it."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    fitness.require_open_files(limit)
    with pytest.raises(MachineUnfit, match=rf"open {limit} files, .* {limit + 1}; .*ulimit -n"):
        fitness.require_open_files(limit + 1)


def test_a_load_onto_a_gpu_needs_main_memory() -> None:
    """A load onto a GPU needs main memory for libraries and buffers; the check skips a model for
    the CPU."""
    fitness.require_memory("cuda", 1)
    with pytest.raises(MachineUnfit, match=r"GB of main memory are free, .* about 1000000 GB"):
        fitness.require_memory("cuda", 10**15)
    fitness.require_memory("cpu", 10**15)


def test_a_gpu_that_is_not_seen(nvml: Install) -> None:
    """NVML's own words are in the sentence; a model for the CPU does not ask it."""
    nvml(failure="Driver Not Loaded")
    with pytest.raises(MachineUnfit, match=r"none was found \(NVML: Driver Not Loaded\)"):
        fitness.require_driver("cuda")
    fitness.require_driver("cpu")


def test_a_model_that_cannot_load_is_no_fault_of_the_machine() -> None:
    """A wrong model name passes the fitness checks; a `MachineUnfit` of the start's check fails
    them."""
    tiny = Settings.from_args({"model": {"name": "tiny", "device": "cpu"}}, "test")
    assert fitness.first_problem(fitness.checks(tiny, ModelLoadFailed("gated"))) is None
    unfit = MachineUnfit("The GPU is too small.", check="gpu_memory")
    found = fitness.checks(tiny, unfit)
    assert fitness.first_problem(found) is unfit
    assert found[-1].__name__ == "gpu_memory"
