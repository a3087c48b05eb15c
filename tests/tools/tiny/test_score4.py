"""What four bits cost the tiny model: its held-out score, before and after."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from serve_app.model.quantization import Quantization
from serve_app.tiny import CHECKPOINT
from tests.model.quantized_oracle import rounded
from tools.tiny.exam import examine

POINTS = 3
QUESTIONS = 200


def test_the_score_falls_by_three_points_at_most(tmp_path: Path) -> None:
    """The exam with the experts and projections that bitsandbytes rounded, by transformers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a model so small only waits for more
    shutil.copytree(CHECKPOINT, tmp_path, dirs_exist_ok=True)
    weights = load_file(CHECKPOINT / "model.safetensors")
    for key, weight in weights.items():
        if ".experts." in key or ".self_attn." in key:
            weights[key] = rounded(weight.float(), Quantization("nf4", "bfloat16"))
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert len(examine(tmp_path)) - len(examine(CHECKPOINT)) <= QUESTIONS * POINTS // 100
    torch.set_num_threads(threads)
