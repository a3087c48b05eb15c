"""What is known of GPUs and drivers without torch."""

import sys
from pathlib import Path

import pytest
import torch

from serve_app.machine.gpus import Gpu, driver_problem, torchs_cuda


@pytest.mark.parametrize(
    ("driver", "cuda", "least"),
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
    driver: str, cuda: str, least: int | None
) -> None:
    """One sentence with both versions; what tells nothing is not refused."""
    problem = driver_problem(Gpu("RTX 5090", 1, 1, driver), cuda)
    if least is None:
        assert problem is None
    else:
        assert problem is not None
        assert f"has driver {driver}, and this image's CUDA {cuda} needs {least}" in problem


def test_torchs_cuda_is_read_from_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real torch's word on it is found, and that of one for a GPU."""
    assert torchs_cuda() == torch.version.cuda
    monkeypatch.delitem(sys.modules, "torch")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert torchs_cuda() is None
    version = tmp_path / "torch" / "version.py"
    version.write_text("__version__ = '2.13.0'\ncuda: Optional[str] = '13.0'\nhip = None\n")
    assert torchs_cuda() == "13.0"
