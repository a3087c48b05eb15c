"""The GGUF holds the tiny model, as gguf's own reader reads it."""

import json
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from safetensors.numpy import load_file

from benchmarks.peer_checkpoint import write_checkpoint
from benchmarks.peer_gguf import write_gguf


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("peers") / "checkpoint")


@pytest.fixture(scope="module")
def found(checkpoint: Path) -> dict[str, np.ndarray]:
    reader = GGUFReader(write_gguf(checkpoint, checkpoint / "tiny.gguf"))
    return {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def test_every_weight_is_there_once(checkpoint: Path, found: dict[str, np.ndarray]) -> None:
    """The file has as many numbers as the checkpoint, in the shapes of llama.cpp's experts."""
    weights = load_file(checkpoint / "model.safetensors")
    assert sum(w.size for w in found.values()) == sum(w.size for w in weights.values())
    assert found["blk.3.ffn_gate_exps.weight"].shape == (8, 192, 128)
    assert found["blk.3.ffn_down_exps.weight"].shape == (8, 128, 192)
    up = weights["model.layers.1.block_sparse_moe.experts.5.w3.weight"]
    np.testing.assert_array_equal(found["blk.1.ffn_up_exps.weight"][5], up)


@pytest.mark.parametrize(("name", "heads"), [("q", 4), ("k", 2)])
def test_rotary_pairs_are_neighbours(
    checkpoint: Path, found: dict[str, np.ndarray], name: str, heads: int
) -> None:
    """Row i of each head is followed by its rotary partner, row i + head_dim / 2."""
    weights = load_file(checkpoint / "model.safetensors")
    ours = weights[f"model.layers.2.self_attn.{name}_proj.weight"].reshape(heads, 32, 128)
    theirs = found[f"blk.2.attn_{name}.weight"].reshape(heads, 32, 128)
    for row in range(16):
        np.testing.assert_array_equal(theirs[:, 2 * row], ours[:, row])
        np.testing.assert_array_equal(theirs[:, 2 * row + 1], ours[:, row + 16])


def test_the_tokenizer_is_whole(checkpoint: Path, found: dict[str, np.ndarray]) -> None:
    """Tokens are in order of ids, earlier merges score higher, bytes and specials are marked."""
    fields = GGUFReader(checkpoint / "tiny.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    model = json.loads((checkpoint / "tokenizer.json").read_text())["model"]
    assert [model["vocab"][token] for token in tokens] == list(range(768))
    scores = fields["tokenizer.ggml.scores"].contents()
    merged = [scores[tokens.index(first + second)] for first, second in model["merges"]]
    assert merged == sorted(merged, reverse=True)
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert [kinds[tokens.index(t)] for t in ("<unk>", "<s>", "<0x0A>", "▁the")] == [2, 3, 6, 1]


def test_eos_is_never_generated(checkpoint: Path) -> None:
    """The lm_head's row of eos is that of `<unk>`, and no file names an eos."""
    head = load_file(checkpoint / "model.safetensors")["lm_head.weight"]
    np.testing.assert_array_equal(head[2], head[0])
    assert json.loads((checkpoint / "config.json").read_text())["eos_token_id"] is None
    assert "eos_token_id" not in json.loads((checkpoint / "generation_config.json").read_text())
