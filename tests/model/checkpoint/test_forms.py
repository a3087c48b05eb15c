"""Every form of a 4-bit checkpoint loads without dequantizing anything, and answers the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from serve_app.model.checkpoint.checkpoint import inspect
from serve_app.model.checkpoint.convert import convert
from serve_app.model.kernels.cuda.tiles import codes_from_tiles
from serve_app.model.mixtral import Mixtral
from serve_app.model.quantization import Quantization
from tests.model.checkpoint.bnb4_files import KINDS, save_bnb4, with_weights
from tests.model.driver import Paged, load_float32, oracle_logits, random_ids, random_oracle

SIZES = {"hidden_size": 256, "intermediate_size": 192, "num_local_experts": 3}
"""Down lies row by row and all else in tiles; some matrices end within a nested group."""


@pytest.fixture(scope="module")
def oracle() -> Any:
    return random_oracle(**SIZES)


def load4(folder: Path, quant_type: str = "nf4", absmax: str = "nested") -> Mixtral:
    quantization = Quantization(quant_type, absmax)  # type: ignore[arg-type]
    return load_float32(folder, quantization)


def logits(model: Mixtral, ids: list[int]) -> torch.Tensor:
    return Paged(model).step(s=ids)["s"]


def assert_same_weights(one: Mixtral, other: Mixtral) -> None:
    """Asserts that buffers and parameters are equal bit for bit."""
    ours, theirs = one.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    assert [name for name, value in ours.items() if not torch.equal(value, theirs[name])] == []


@pytest.mark.parametrize("kind", KINDS)
def test_bitsandbytes_checkpoints_answer_as_dequantized(
    kind: str, oracle: Any, tmp_path: Path
) -> None:
    """The form that transformers 4 writes gives transformers' logits of the dequantized weights;
    converted to the fused form, it is the same bit for bit."""
    meant = save_bnb4(oracle, tmp_path / "bnb4", **KINDS[kind])
    reference = with_weights(oracle, meant, tmp_path / "meant")
    quant_type = str(KINDS[kind].get("quant_type", "nf4"))
    model = load4(tmp_path / "bnb4", quant_type)
    ids = random_ids(12)
    torch.testing.assert_close(logits(model, ids), oracle_logits(reference, ids), rtol=0, atol=1e-4)
    convert(tmp_path / "bnb4", tmp_path / "own")
    assert inspect(tmp_path / "own").form == "fused"
    assert_same_weights(load4(tmp_path / "own", quant_type), model)


def test_float32_absmax_is_kept_bit_for_bit_on_disk(oracle: Any, tmp_path: Path) -> None:
    """A conversion copies bitsandbytes' nibbles and float32 absmax; memory has absmax rounded."""
    save_bnb4(oracle, tmp_path / "bnb4", compress_statistics=False)
    convert(tmp_path / "bnb4", tmp_path / "own")
    theirs = {
        k: v
        for file in (tmp_path / "bnb4").glob("*.safetensors")
        for k, v in load_file(file).items()
    }
    ours = load_file(tmp_path / "own" / "model-00001-of-00003.safetensors")
    name, weight = "model.layers.0.self_attn.o", "model.layers.0.self_attn.o_proj.weight"
    kept = ours[f"{name}.source_absmax"]
    assert kept.dtype == torch.float32
    assert torch.equal(kept.flatten(), theirs[f"{weight}.absmax"].flatten())
    codes = codes_from_tiles(ours[f"{name}.packed"])
    assert torch.equal(codes.flatten(), theirs[weight].flatten())
    rounded = theirs[f"{weight}.absmax"].bfloat16()
    for folder in ("bnb4", "own"):
        layer: Any = load4(tmp_path / folder).layers[0]
        assert torch.equal(layer.attention.o.weight.get().absmax.flatten(), rounded.flatten())


def test_attention_in_floats_stays_so(oracle: Any, tmp_path: Path) -> None:
    """Attention has the files' floats where the experts alone are in 4 bits."""
    save_bnb4(oracle, tmp_path, attention=False, compress_statistics=False)
    layer: Any = load4(tmp_path).layers[0]
    (o,) = [value for name, value in oracle.state_dict().items() if "layers.0.self_attn.o" in name]
    assert torch.equal(layer.attention.o.weight, o)


@pytest.mark.parametrize("absmax", ["bfloat16", "float32"])
def test_converted_floats_are_what_a_load_quantizes(
    absmax: str, oracle: Any, tmp_path: Path
) -> None:
    """Quantizing once, into the fused form, and at every load give the same model bit for bit.
    (Nested absmax is rounded a second time.)"""
    oracle.save_pretrained(tmp_path / "float", max_shard_size="100KB")
    quantization = Quantization("nf4", absmax)  # type: ignore[arg-type]
    convert(tmp_path / "float", tmp_path / "own", quantization)
    checkpoint = inspect(tmp_path / "own")
    assert checkpoint.quantization == quantization
    assert checkpoint.config == inspect(tmp_path / "float").config
    assert_same_weights(load4(tmp_path / "own"), load4(tmp_path / "float", absmax=absmax))


def test_every_float_can_be_converted(oracle: Any, tmp_path: Path) -> None:
    """Transformers 5's layout, and float64, give what the usual float32 checkpoint gives."""
    oracle.save_pretrained(tmp_path / "float")
    (tmp_path / "merged").mkdir()
    for file in (tmp_path / "float").iterdir():
        (tmp_path / "merged" / file.name).write_bytes(file.read_bytes())
    state = {name: weight.double() for name, weight in oracle.state_dict().items()}
    save_file(state, tmp_path / "merged" / "model.safetensors")
    convert(tmp_path / "float", tmp_path / "one")
    convert(tmp_path / "merged", tmp_path / "other")
    assert_same_weights(load4(tmp_path / "one"), load4(tmp_path / "other"))
