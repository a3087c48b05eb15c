"""Our own form, made from bitsandbytes' 4 bits and converted back, has its source's bytes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from serve_app.errors import ModelLoadFailed
from serve_app.model.checkpoint.checkpoint import inspect
from serve_app.model.checkpoint.convert import convert
from serve_app.model.quantization import Quantization
from serve_app.model.quantize import quantize
from serve_app.model.quantized_weight import Codebook, QuantizedWeight
from tests.model.checkpoint.bnb4_files import KINDS, save_bnb4
from tests.model.checkpoint.version1 import write_version_1
from tests.model.driver import Paged, load_float32, random_ids, random_oracle

SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 192,
    "num_local_experts": 3,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
"""Down lies row by row and all else in tiles; some matrices end within a nested group."""


@pytest.fixture(scope="module")
def oracle() -> Any:
    return random_oracle(**SIZES)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def assert_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Asserts that all tensors have the same bytes, and the same descriptions of weights."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if "quant_state" in name:
            assert json.loads(bytes(found[name].tolist())) == json.loads(bytes(tensor.tolist()))
        else:
            theirs = tensor.flatten().view(torch.uint8)
            assert torch.equal(found[name].flatten().view(torch.uint8), theirs), name


@pytest.mark.parametrize("kind", KINDS)
def test_every_byte_comes_back(kind: str, oracle: Any, tmp_path: Path) -> None:
    """Codes, absmax of either kind and its tables are bitsandbytes' own, in its names and order;
    the model loads from them and gives the same logits bit for bit."""
    save_bnb4(oracle, tmp_path / "bnb4", **KINDS[kind])
    convert(tmp_path / "bnb4", tmp_path / "own")
    convert(tmp_path / "own", tmp_path / "back")
    assert_same_tensors(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "bnb4"))
    checkpoint = inspect(tmp_path / "back")
    assert checkpoint.form == "bitsandbytes"
    wanted, ids = checkpoint.quantization, random_ids(5)
    logits = [
        Paged(load_float32(tmp_path / folder, wanted)).step(s=ids)["s"]
        for folder in ("bnb4", "own", "back")
    ]
    assert torch.equal(logits[1], logits[0])
    assert torch.equal(logits[2], logits[0])


@pytest.mark.parametrize("absmax", ["float32", "nested"])
def test_floats_become_what_bitsandbytes_makes_of_them(
    absmax: Any, oracle: Any, tmp_path: Path
) -> None:
    """Floats that `convert` quantizes, given back: bitsandbytes' own bytes of the same floats."""
    save_bnb4(oracle, tmp_path / "bnb4", compress_statistics=absmax == "nested")
    oracle.save_pretrained(tmp_path / "float")
    convert(tmp_path / "float", tmp_path / "own", Quantization("nf4", absmax))
    convert(tmp_path / "own", tmp_path / "back")
    assert_same_tensors(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "bnb4"))


@pytest.mark.parametrize("is_nested", [True, False])
def test_version_1_is_read(is_nested: bool, oracle: Any, tmp_path: Path) -> None:
    """Weights that lie row by row with the source's absmax become the same model bit for bit; they
    are not converted back."""
    save_bnb4(oracle, tmp_path / "bnb4", compress_statistics=is_nested)
    (tmp_path / "old").mkdir()
    write_version_1(tmp_path / "bnb4", tmp_path / "old")
    wanted = inspect(tmp_path / "old").quantization
    assert wanted == Quantization("nf4", "nested" if is_nested else "float32")
    old = load_float32(tmp_path / "old", wanted).state_dict()
    expected = load_float32(tmp_path / "bnb4", wanted).state_dict()
    assert old.keys() == expected.keys()
    assert [name for name in old if not torch.equal(old[name], expected[name])] == []
    with pytest.raises(ModelLoadFailed, match="version 1 of our own form cannot"):
        convert(tmp_path / "old", tmp_path / "back")


def test_another_checkpoint_is_not_overwritten(oracle: Any, tmp_path: Path) -> None:
    """The folder that a checkpoint of our own was made from is no destination."""
    save_bnb4(oracle, tmp_path / "bnb4", compress_statistics=True)
    convert(tmp_path / "bnb4", tmp_path / "own")
    with pytest.raises(ModelLoadFailed, match="holds another checkpoint"):
        convert(tmp_path / "own", tmp_path / "bnb4")


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=3),
    st.sampled_from([64, 192, 256, 512]),
    st.booleans(),
    st.sampled_from([(), (2,)]),
    st.integers(0, 2**32),
)
def test_parts_come_back(
    eights: list[int], in_features: int, interleaved: bool, stack: tuple[int, ...], seed: int
) -> None:
    """A part of a weight is what was put there, row by row or in tiles, and `get` has the rows of
    all parts in their order."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [8 * eights[0]] * 2 if interleaved else [8 * one for one in eights]
    weight = QuantizedWeight(
        Codebook("nf4"), stack, in_features, tuple(sizes), interleaved=interleaved
    )
    indices: list[tuple[int, ...]] = [(i,) for i in range(2)] if stack else [()]
    given_parts = {}
    for index in indices:
        for part, size in enumerate(sizes):
            floats = torch.randn(size, in_features, generator=generator)
            given_parts[index, part] = quantize(floats, "nf4", "bfloat16")
            weight.load_weight(given_parts[index, part], index[0] if index else None, part)
    for (index, part), matrix in given_parts.items():
        found = weight.part(index, part)
        assert torch.equal(found.packed, matrix.packed)
        assert torch.equal(found.absmax, matrix.absmax)
    for index in indices:
        parts = [given_parts[index, part].packed for part in range(len(sizes))]
        rows = torch.cat(parts)
        if interleaved:
            rows = torch.stack([part.view(-1, 8, part.shape[1]) for part in parts], 1).flatten(0, 2)
        assert torch.equal(weight.get(index).packed, rows)
    assert weight.is_tiled == (
        in_features % 256 == 0 and all(size % (8 if interleaved else 16) == 0 for size in sizes)
    )
