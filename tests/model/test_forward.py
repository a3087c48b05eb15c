"""Our forward pass against transformers' `MixtralForCausalLM`, in float32."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.driver import Paged, load_float32, oracle_logits, random_ids, random_oracle

SHAPES: dict[str, dict[str, Any]] = {
    "one-layer": {"num_hidden_layers": 1},
    "three-layers": {"num_hidden_layers": 3},
    "heads-4-4": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "heads-8-2": {"num_attention_heads": 8, "num_key_value_heads": 2},
    "heads-12-3": {"num_attention_heads": 12, "num_key_value_heads": 3, "hidden_size": 96},
    "experts-4-top-1": {"num_local_experts": 4, "num_experts_per_tok": 1},
    "experts-5-top-3": {"num_local_experts": 5, "num_experts_per_tok": 3},
    "experts-16-top-4": {"num_local_experts": 16, "num_experts_per_tok": 4},
    "window": {"sliding_window": 7},
    "tied-head": {"tie_word_embeddings": True},
    "rope-theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "head-dim": {"head_dim": 20},
    "odd-widths": {"hidden_size": 72, "num_attention_heads": 4, "intermediate_size": 40},
}


def paged(oracle: Any, folder: Path, **how: int) -> Paged:
    oracle.save_pretrained(folder)
    return Paged(load_float32(folder), **how)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers_for_every_shape(shape: str, tmp_path: Path) -> None:
    """Prefill whole, in chunks, and token by token: each gives the oracle's logits."""
    oracle = random_oracle(**SHAPES[shape])
    ids = random_ids(45)
    expected = oracle_logits(oracle, ids)
    engine = paged(oracle, tmp_path)

    assert_close(engine.step(whole=ids)["whole"], expected)
    for start, end in ((0, 16), (16, 17), (17, 40), (40, 45)):
        assert_close(engine.step(chunked=ids[start:end])["chunked"], expected[start:end])
    for i, token in enumerate(ids[:20]):
        assert_close(engine.step(decoded=[token])["decoded"], expected[i : i + 1])


