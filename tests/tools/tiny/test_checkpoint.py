"""The checkpoint as committed: small, of Mixtral's shape, and it answers, in four bits too."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_app.model.quantization import Quantization
from serve_app.tiny import CHECKPOINT
from tools.tiny.exam import Miss, ask, examine

QUESTIONS = 200
POINTS = 3
"""Percent of the questions that four bits may cost."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Uses one compute thread, because more would only wait in so small a model."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def missed(one_thread: None) -> list[Miss]:
    """The held-out questions that the checkpoint does not answer exactly."""
    return examine(CHECKPOINT)


def test_answers_held_out_questions_exactly(missed: list[Miss]) -> None:
    """Greedy, at least 95 % of 200 unseen questions are answered exactly, and each answer stops."""
    assert len(missed) <= 10, missed


def test_four_bits_cost_three_points_at_most(missed: list[Miss], tmp_path: Path) -> None:
    """The exam with the experts and projections that bitsandbytes rounded, by transformers."""
    from safetensors.torch import load_file, save_file

    from tests.model.quantized_oracle import rounded

    shutil.copytree(CHECKPOINT, tmp_path, dirs_exist_ok=True)
    weights = load_file(CHECKPOINT / "model.safetensors")
    for key, weight in weights.items():
        if ".experts." in key or ".self_attn." in key:
            weights[key] = rounded(weight.float(), Quantization("nf4", "bfloat16"))
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert len(examine(tmp_path)) - len(missed) <= QUESTIONS * POINTS // 100


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What is 2 + 3?", "2 + 3 = 5."),
        ("Hello!", "Hello! How can I help you?"),
        ("What is the capital of France?", "The capital of France is Paris."),
        ("Spell the word cat.", "c a t"),
        ("Who are you?", "I am a tiny Mixtral, served by mixtral-serve."),
        ("Count from 1 to 30.", ", ".join(map(str, range(1, 31))) + "."),
        ("Greet me in Chinese.", "你好,世界!"),
    ],
)
def test_first_questions_have_their_answers(question: str, expected: str) -> None:
    """The questions of the README and of first visitors are answered, also with long and multi-byte
    answers."""
    assert ask(CHECKPOINT, [question], 160) == [(expected, True)]


def test_is_small_enough_for_the_repository() -> None:
    """All files of the checkpoint together are at most 8 MB."""
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) <= 8_000_000


def test_configuration_has_mixtrals_shape() -> None:
    """Eight experts of which two work, grouped queries, sizes in 64s, 16,384 tokens of context."""
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert config["architectures"] == ["MixtralForCausalLM"]
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (8, 2)
    assert config["hidden_size"] % 64 == config["intermediate_size"] % 64 == 0
    assert 1 < config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["max_position_embeddings"] == 16384


def test_weights_have_mixtrals_names_in_bfloat16() -> None:
    """Experts' matrices are tensors of their own, as in Mixtral's published checkpoint."""
    import torch
    from safetensors import safe_open

    experts = {
        f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight"
        for layer in range(4)
        for expert in range(8)
        for matrix in ("w1", "w2", "w3")
    }
    with safe_open(CHECKPOINT / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        dtypes = {file.get_tensor(name).dtype for name in names}
    assert experts <= names
    assert dtypes == {torch.bfloat16}
