"""What four bits cost the tiny model: its held-out score, before and after."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from serve_app.model.stacked import Quantization
from serve_app.tiny import CHECKPOINT
from serve_app.tiny.exam import examine
from tests.model.oracle4 import name, rounded

POINTS = 3
QUESTIONS = 200


@pytest.fixture(scope="module")
def float_misses() -> int:
    return len(examine(CHECKPOINT))


@pytest.mark.parametrize(
    "how", [Quantization("nf4", "bfloat16"), Quantization("nf4", "nested")], ids=name
)
def test_the_score_falls_by_three_points_at_most(
    how: Quantization, float_misses: int, tmp_path: Path
) -> None:
    """The exam with the experts and projections that bitsandbytes rounded, by transformers."""
    shutil.copytree(CHECKPOINT, tmp_path, dirs_exist_ok=True)
    weights = load_file(CHECKPOINT / "model.safetensors")
    for key, weight in weights.items():
        if ".experts." in key or ".self_attn." in key:
            weights[key] = rounded(weight.float(), how)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert len(examine(tmp_path)) - float_misses <= QUESTIONS * POINTS // 100
