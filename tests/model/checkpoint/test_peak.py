"""The peak memory of a load, at Mixtral 8x7B's true matrix sizes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.model.checkpoint import full_size

EXPERT_BYTES = 3 * 4096 * 14336 * 2
"""One expert in bfloat16."""
NUM_EXPERTS = 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layer of Mixtral 8x7B with two of its experts and a small vocabulary, in one shard."""
    tensors: full_size.Tensors = {}
    for name, (dtype, shape, data) in full_size.floats().items():
        if ".layers." in name and ".layers.0." not in name:
            continue
        if any(f".experts.{expert}." in name for expert in range(NUM_EXPERTS, 8)):
            continue
        rows = {32000: 256, 8: NUM_EXPERTS}.get(shape[0], shape[0])
        tensors[name] = dtype, [rows, *shape[1:]], data
    sizes = {"num_hidden_layers": 1, "num_local_experts": NUM_EXPERTS, "vocab_size": 256}
    folder = tmp_path_factory.mktemp("layer")
    return full_size.write(folder, tensors, 1, max_position_embeddings=1024, **sizes)


def test_quantizing_takes_less_than_one_expert_above_the_model(checkpoint: Path) -> None:
    """On the device the final size and less than an expert in bfloat16, in all that is done.

    Where the CPU is the device, host memory is measured, with the files' tensors in it.
    """
    command = [sys.executable, "-m", "tests.model.checkpoint.peak", str(checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    peak = found["host"] if found["device"] is None else found["device"]
    assert found["model"] < peak < found["model"] + EXPERT_BYTES
    # With a GPU the host holds a tensor or two, however large the checkpoint is.
    assert found["device"] is None or found["host"] < 2 * EXPERT_BYTES
