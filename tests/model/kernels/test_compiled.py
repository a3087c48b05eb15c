"""The Triton kernels, compiled for GPUs that are not here."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("capability", [80, 90, 120])
def test_they_compile_at_mixtrals_sizes(capability: int) -> None:
    """For an A100, an H200 and a 5090: no spills, shared memory enough, and the decoding of 4 bits
    within its budget of instructions per weight."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.model.kernels.compiled", str(capability)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "nf4_kernels.gate_up_kernel" in run.stdout
