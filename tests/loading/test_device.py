"""The device of a load, and how a lack of memory on it is explained."""

import pytest
import torch

from serve_app.errors import ModelLoadFailed
from serve_app.loading import device
from serve_app.loading.device import explained_lack_of_memory, set_threads

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("error", "num_bytes"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), 1),
        (MemoryError(), 1),
        (RuntimeError("DefaultCPUAllocator: can't allocate"), 10**15),
    ],
)
def test_a_lack_of_memory_is_one_sentence(error: Exception, num_bytes: int) -> None:
    """The error has the bytes needed and free. For a CPU torch raises a RuntimeError."""
    sentence = (
        r"not enough memory for the weights: [\d.]+ GB are needed, but only [\d.]+ GB of main "
        "memory were"
    )
    with (
        pytest.raises(ModelLoadFailed, match=sentence),
        explained_lack_of_memory("the weights", num_bytes, CPU, "take more"),
    ):
        raise error


def test_another_error_is_not_a_lack_of_memory() -> None:
    """The words of an error do not decide, and what fits is not short of memory."""
    with (
        pytest.raises(RuntimeError, match="shared memory"),
        explained_lack_of_memory("the weights", 1, CPU, "take more"),
    ):
        raise RuntimeError("a file in shared memory is broken")


def test_one_core_is_left_for_network_io(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default number of threads, at least one, is noted; a chosen number is not."""
    numbers: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    for cores, note in (
        (8, "torch uses 7 of 8 cores"),
        (1, "torch uses 1 of 1 cores"),
    ):
        monkeypatch.setattr(device, "num_cores", lambda cores=cores: cores)
        assert set_threads(None)[0].startswith(note)
    assert set_threads(3) == []
    assert numbers == [7, 1, 3]
