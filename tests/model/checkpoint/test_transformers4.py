"""Checkpoints that transformers 4 wrote in 4 bits give the logits that it computes from them.

`transformers4/save.py` wrote the files and recorded the logits.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from serve_app.errors import ModelLoadFailed
from serve_app.model.checkpoint.checkpoint import inspect
from serve_app.model.checkpoint.convert import convert
from serve_app.model.checkpoint.source import Source
from serve_app.model.checkpoint.tensor_names import LM_HEAD, weights
from serve_app.model.kernels.triton.gpu_step import GpuStep
from serve_app.model.kernels.unavailable import StepUnavailable
from serve_app.model.quantization import Quantization
from tests.model.checkpoint.bnb4_files import with_weights
from tests.model.driver import Paged, load_float32, load_folder, oracle_logits, random_oracle

FOLDER = Path(__file__).parent / "transformers4"
RECORDED = load_file(FOLDER / "logits.safetensors")
IDS: list[int] = RECORDED["ids"].tolist()
ROUTER = "model.layers.0.block_sparse_moe.gate.weight"
TOLERANCES = {
    "default": 2e-3,  # memory rounds float32 and nested absmax to bfloat16
    "everything-nf4-nested": 1e-2,
    "skip-gate-fp4-nested-bf16": 5e-3,  # transformers rounds what it dequantizes to bfloat16
    "skip-attention-nf4-bf16": 5e-3,
    "skip-experts-nf4-nested": 5e-3,  # experts and attention in floats: no 4 bits are left
}
"""Largest relative error of the logits; a router that is read wrongly gives more than 0.1."""
SKIPPED = ["skip-attention-nf4-bf16", "skip-experts-nf4-nested"]
"""Checkpoints with experts or attention in floats beside 4 bits."""


def relative_error(found: Tensor, name: str) -> float:
    return float((found - RECORDED[name]).norm() / RECORDED[name].norm())


@pytest.mark.parametrize("name", TOLERANCES)
def test_logits_are_those_of_transformers_4(name: str, tmp_path: Path) -> None:
    """What the files have in floats stays so; converted, the logits are bit-equal."""
    wanted = inspect(FOLDER / name).quantization
    logits = Paged(load_float32(FOLDER / name, wanted)).step(s=IDS)["s"]
    assert relative_error(logits, name) < TOLERANCES[name]
    if name not in SKIPPED:
        convert(FOLDER / name, tmp_path)
        assert torch.equal(Paged(load_float32(tmp_path, wanted)).step(s=IDS)["s"], logits)


def test_floats_beside_4_bits_have_no_compiled_step() -> None:
    """The kernels of a GPU's step take layers in one form, so the model runs in plain torch."""
    name = "skip-attention-nf4-bf16"
    model = load_float32(FOLDER / name, inspect(FOLDER / name).quantization)
    with pytest.raises(StepUnavailable, match="in floats beside 4 bits"):
        GpuStep.verified(model, Paged(model).cache, 8)


def test_floats_beside_4_bits_are_not_converted(tmp_path: Path) -> None:
    """Our own form holds experts and attention in 4 bits alone, so `convert` says what to do."""
    with pytest.raises(ModelLoadFailed, match="serve it as it is"):
        convert(FOLDER / "skip-attention-nf4-bf16", tmp_path)


@pytest.mark.parametrize("name", SKIPPED)
def test_any_list_of_skipped_modules_is_read(name: str, tmp_path: Path) -> None:
    """The weights as read, given to transformers, compute what transformers 4 does."""
    source = Source(inspect(FOLDER / name))
    config = source.checkpoint.config
    read = {it.name: source.floats(it).float() for it in weights(config).values()}
    sizes = {key: getattr(config, key) for key in ("intermediate_size", "num_local_experts")}
    oracle: Any = random_oracle(num_attention_heads=4, num_hidden_layers=1, **sizes)
    reference = with_weights(oracle, read, tmp_path)
    assert relative_error(oracle_logits(reference, IDS), name) < 5e-3


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("default", ROUTER),
        ("skip-gate-fp4-nested-bf16", LM_HEAD),
        ("everything-nf4-nested", LM_HEAD),
    ],
)
def test_floats_are_those_of_bitsandbytes(name: str, tensor: str) -> None:
    """A router or lm_head in 4 bits becomes, bit for bit, what bitsandbytes dequantizes."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    source = Source(inspect(FOLDER / name))
    found = source.floats(weights(source.checkpoint.config)[tensor])
    parts = load_file(FOLDER / name / "model.safetensors")
    state = {key: part for key, part in parts.items() if key.startswith(f"{tensor}.")}
    quant_state = QuantState.from_dict(state, device=torch.device("cpu"))
    expected = dequantize_4bit(parts[tensor].view(torch.uint8), quant_state)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("default", ["router: in 4 bits in the checkpoint, held as floats"]),
        (
            "skip-attention-nf4-bf16",
            [
                "router: in 4 bits in the checkpoint, held as floats",
                "attention in 1 of 1 layers: has floats in the checkpoint, held as floats",
            ],
        ),
        (
            "skip-experts-nf4-nested",
            ["router, lm_head: in 4 bits in the checkpoint, held as floats"],
        ),
    ],
)
def test_notes_name_weights_that_change_their_form(name: str, expected: list[str]) -> None:
    """The notes of the log and `/health` name weights that the model holds in another form."""
    checkpoint = inspect(FOLDER / name)
    assert checkpoint.notes() == expected


@pytest.mark.parametrize(
    ("tensors", "modules"),
    [
        (["self_attn.k_proj"], {"layers.0.attention"}),
        (["block_sparse_moe.experts.1.w2"], {"layers.0.mlp.experts"}),
        (
            ["self_attn.o_proj", "block_sparse_moe.experts.3.w1"],
            {"layers.0.attention", "layers.0.mlp.experts"},
        ),
    ],
)
def test_one_float_makes_a_module_floats(
    tensors: list[str], modules: set[str], tmp_path: Path
) -> None:
    """A part of a layer of which single weights are floats is held as floats, without rounding."""
    name = "everything-nf4-nested"
    shutil.copytree(FOLDER / name, tmp_path, dirs_exist_ok=True)
    source = Source(inspect(FOLDER / name))
    parts = load_file(tmp_path / "model.safetensors")
    for key in (f"model.layers.0.{tensor}.weight" for tensor in tensors):
        parts = {name: part for name, part in parts.items() if not name.startswith(key)}
        parts[key] = source.floats(weights(source.checkpoint.config)[key])
    save_file(parts, tmp_path / "model.safetensors")
    checkpoint = inspect(tmp_path)
    assert checkpoint.float_modules == modules
    model = load_float32(tmp_path, checkpoint.quantization)
    assert relative_error(Paged(model).step(s=IDS)["s"], name) < TOLERANCES[name]


@pytest.mark.parametrize("name", ["everything-nf4-nested", "skip-experts-nf4-nested"])
def test_an_lm_head_in_4_bits_can_stay_so(name: str) -> None:
    """`quantize_lm_head` gives the logits that a head held as floats gives."""
    wanted = Quantization("nf4", "nested")
    logits = [
        Paged(load_folder(FOLDER / name, torch.float32, wanted, in_4_bits)).step(s=IDS)["s"]
        for in_4_bits in (False, True)
    ]
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=0.02)
