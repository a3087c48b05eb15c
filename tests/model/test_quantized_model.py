"""A float checkpoint, quantized while it loads: its logits, its bytes, its refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import serve_app.tiny
from serve_app.errors import ModelLoadFailed
from serve_app.model.checkpoint.checkpoint import inspect
from serve_app.model.checkpoint.convert import convert
from serve_app.model.checkpoint.fused_writer import write_file
from serve_app.model.checkpoint.loader import bytes_by_part, check_bytes
from serve_app.model.experts import Experts
from serve_app.model.footprint import weight_bytes
from serve_app.model.linear import Linear, QuantizedLinear
from serve_app.model.mixtral import DecoderLayer, Mixtral
from serve_app.model.quantization import Quantization
from serve_app.model.quantize import dequantize
from tests.model.driver import (
    Paged,
    load_float32,
    load_folder,
    oracle_logits,
    random_ids,
    random_oracle,
)
from tests.model.quantized_oracle import VARIANTS, name, round_model, rounded

NF4 = Quantization("nf4", "bfloat16")
SHAPES: dict[str, dict[str, Any]] = {
    "narrow": {"intermediate_size": 64},
    "in tiles": {"hidden_size": 256, "intermediate_size": 256, "num_local_experts": 3},
    "odd": {
        "hidden_size": 192,
        "intermediate_size": 320,
        "head_dim": 48,
        "num_key_value_heads": 4,
        "num_local_experts": 5,
        "num_experts_per_tok": 3,
        "tie_word_embeddings": True,
    },
}


@pytest.mark.parametrize("how", VARIANTS, ids=name)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers_with_dequantized_weights(
    shape: str, how: Quantization, tmp_path: Path
) -> None:
    """Prefill and decode give the oracle's logits, whose weights bitsandbytes has rounded."""
    oracle = random_oracle(**SHAPES[shape])
    ids = random_ids(30)
    exact = oracle_logits(oracle, ids)
    oracle.save_pretrained(tmp_path)
    round_model(oracle, how)
    expected = oracle_logits(oracle, ids)
    assert (expected - exact).abs().max() > 0.1  # rounding is seen, so doing without would be too

    engine = Paged(load_float32(tmp_path, how))
    ours = [engine.step(s=ids[:25])["s"]] + [engine.step(s=[token])["s"] for token in ids[25:]]
    torch.testing.assert_close(torch.cat(ours), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("how", VARIANTS, ids=name)
def test_weights_are_quantized_before_they_are_rounded(how: Quantization, tmp_path: Path) -> None:
    """A float32 checkpoint in a bfloat16 model: what is quantized is the file's float32."""
    oracle = random_oracle(**SHAPES["narrow"])
    oracle.save_pretrained(tmp_path)
    model = load_folder(tmp_path, torch.bfloat16, how)
    for block, layer in zip(model.layers, oracle.model.layers, strict=True):
        assert isinstance(block, DecoderLayer)
        assert isinstance(block.attention.o, QuantizedLinear)
        unpacked = dequantize(block.attention.o.weight.get(), torch.float32)
        assert torch.equal(unpacked, rounded(layer.self_attn.o_proj.weight, how))


@pytest.mark.parametrize("how", VARIANTS, ids=name)
def test_the_bytes_are_those_promised(how: Quantization) -> None:
    """The tiny model takes what its sizes promise, to the byte."""
    folder = Path(serve_app.tiny.__file__).parent / "checkpoint"
    model = load_folder(folder, torch.bfloat16, how)
    promised = weight_bytes(model.config, 2, how)
    loaded = bytes_by_part(model)
    assert loaded["head"] == promised["head"]
    assert loaded["experts"] == promised["experts"]
    assert loaded["attention"] == promised["attention"]
    floats = weight_bytes(model.config, 2)
    assert 3.5 < floats["experts"] / loaded["experts"] < 3.9
    assert {w.dtype for _, w in model.named_parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("how", VARIANTS, ids=name)
def test_the_head_is_quantized_where_the_settings_say_so(how: Quantization, tmp_path: Path) -> None:
    """From floats and our own form: the logits of an oracle with a rounded head, and the bytes."""
    oracle = random_oracle(**SHAPES["narrow"])
    oracle.save_pretrained(tmp_path / "floats")
    convert(tmp_path / "floats", tmp_path / "ours", how)
    round_model(oracle, how)
    ids = random_ids(20)
    float_head = oracle_logits(oracle, ids)
    oracle.lm_head.weight.data = rounded(oracle.lm_head.weight, how)
    expected = oracle_logits(oracle, ids)
    assert (expected - float_head).abs().max() > 0.1
    for folder in ("floats", "ours"):
        model = load_folder(tmp_path / folder, torch.float32, how, quantize_lm_head=True)
        torch.testing.assert_close(Paged(model).step(s=ids)["s"], expected, rtol=0, atol=1e-4)
        promised = weight_bytes(model.config, 4, how, quantize_lm_head=True)["head"]
        assert bytes_by_part(model)["head"] == promised


def test_a_head_that_cannot_be_quantized_is_refused(tmp_path: Path) -> None:
    """A tied head, a model in floats, and a checkpoint whose code values differ from ours."""
    random_oracle(**SHAPES["odd"]).save_pretrained(tmp_path / "tied")
    random_oracle(**SHAPES["narrow"]).save_pretrained(tmp_path / "floats")
    convert(tmp_path / "floats", tmp_path / "ours", NF4)
    for file in (tmp_path / "ours").glob("*.safetensors"):
        change_tables(file)

    def refusal(folder: str, how: Quantization | None) -> str:
        with pytest.raises(ModelLoadFailed) as refused:
            load_folder(tmp_path / folder, torch.float32, how, quantize_lm_head=True)
        return refused.value.message

    assert "it uses the embedding matrix" in refusal("tied", NF4)
    assert "needs a `model.quantization`" in refusal("floats", None)
    assert "code values differ from ours" in refusal("ours", NF4)


def change_tables(file: Path) -> None:
    """Doubles the values that nibbles stand for in one of our own files, checksums and all."""
    weights = load_file(file)
    if "quantization.code" in weights:
        weights["quantization.code"] *= 2
        write_file(file, weights, "changed")


@pytest.fixture
def model(tmp_path: Path) -> Mixtral:
    """A loaded model in NF4 with four layers of eight experts."""
    random_oracle(**SHAPES["narrow"], num_hidden_layers=4).save_pretrained(tmp_path)
    return load_folder(tmp_path, torch.bfloat16, NF4)


def last_block(model: Mixtral) -> DecoderLayer:
    block = model.layers[-1]
    assert isinstance(block, DecoderLayer)
    return block


def test_experts_left_in_bfloat16_fail_the_load(model: Mixtral) -> None:
    """One layer's experts as floats among four: the sentence names the part."""
    check_bytes(model, torch.bfloat16, NF4)
    last_block(model).mlp.experts = Experts(model.config).bfloat16()
    with pytest.raises(ModelLoadFailed, match=r"`experts` need .* but nf4 needs") as failed:
        check_bytes(model, torch.bfloat16, NF4)
    assert not failed.value.retry


def test_one_expert_left_in_bfloat16_fails_the_load(model: Mixtral) -> None:
    """A single expert of 32 that is kept as floats beside its 4 bits is noticed."""
    expert = torch.empty(3, 64, 64, dtype=torch.bfloat16)
    last_block(model).mlp.experts.register_buffer("spare", expert)
    with pytest.raises(ModelLoadFailed, match="`experts`"):
        check_bytes(model, torch.bfloat16, NF4)


def test_attention_and_head_are_checked_too(model: Mixtral) -> None:
    """A projection left in bfloat16, a head in float32: each is named."""
    projection = last_block(model).attention.o
    last_block(model).attention.o = Linear(64, (64,)).bfloat16()
    with pytest.raises(ModelLoadFailed, match="`attention`"):
        check_bytes(model, torch.bfloat16, NF4)
    last_block(model).attention.o = projection
    assert isinstance(model.lm_head, Linear)
    model.lm_head.weight.data = model.lm_head.weight.float()
    with pytest.raises(ModelLoadFailed, match="`head`"):
        check_bytes(model, torch.bfloat16, NF4)


def test_the_load_itself_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that forgets the experts, as transformers' own does, does not get past the load."""
    random_oracle(**SHAPES["narrow"]).save_pretrained(tmp_path)
    monkeypatch.setattr(
        "serve_app.model.mixtral.QuantizedExperts", lambda config, codes: Experts(config)
    )
    with pytest.raises(ModelLoadFailed, match="`experts`"):
        load_folder(tmp_path, torch.bfloat16, NF4)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"hidden_size": 72, "num_attention_heads": 4, "head_dim": 16}, "hidden_size"),
        ({}, "intermediate_size"),  # 48
        ({"head_dim": 20, "intermediate_size": 64}, "num_attention_heads"),
    ],
)
def test_sizes_without_whole_blocks_are_refused(
    changes: dict[str, Any], key: str, tmp_path: Path
) -> None:
    """A matrix whose rows are no multiple of 64 loads as floats and is refused in 4 bits."""
    random_oracle(**changes).save_pretrained(tmp_path)
    inspect(tmp_path)
    with pytest.raises(ModelLoadFailed, match=key):
        load_float32(tmp_path, NF4)
