"""Writes 4-bit checkpoints the way transformers 4.x with bitsandbytes wrote them.

Per-expert names, each quantized matrix followed by what `QuantState.as_dict(packed=True)` gives;
transformers 5 can neither write nor read them.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.bitsandbytes_functions import functional

KINDS: dict[str, dict[str, Any]] = {
    "nested": {"compress_statistics": True},
    "plain": {"compress_statistics": False},
    "fp4": {"compress_statistics": True, "quant_type": "fp4"},
    "bf16 storage": {"compress_statistics": True, "quant_storage": torch.bfloat16},
    "f32 storage": {"compress_statistics": False, "quant_storage": torch.float32},
}
"""Arguments of `quantize_4bit`; by default nf4, stored as bytes."""


def save_bnb4(
    oracle: Any, folder: Path, *, attention: bool = True, shards: int = 2, **how: Any
) -> dict[str, torch.Tensor]:
    """Writes `oracle` in 4 bits into `folder`.

    Returns its weights as bitsandbytes dequantizes them, absmax rounded to bfloat16 first, as it
    is in memory.
    """
    bnb = functional()
    oracle.save_pretrained(folder)
    file = folder / "model.safetensors"
    floats = load_file(file)
    file.unlink()
    stored: dict[str, torch.Tensor] = {}
    meant = dict(floats)
    for name, weight in floats.items():
        if ".experts." not in name and not (attention and "_proj." in name):
            stored[name] = weight
            continue
        packed, state = bnb.quantize_4bit(weight, **{"quant_type": "nf4", **how})
        stored[name] = packed
        stored |= {f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()}
        if state.nested:
            state.absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
            state.nested = False
        state.absmax = state.absmax.bfloat16().float()
        meant[name] = bnb.dequantize_4bit(packed, state)
    save_shards(stored, folder, shards)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": str(how.get("quant_storage", "uint8")).removeprefix("torch."),
        "bnb_4bit_quant_type": how.get("quant_type", "nf4"),
        "bnb_4bit_use_double_quant": how.get("compress_statistics", False),
        "llm_int8_skip_modules": ["lm_head"],
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return meant


def save_shards(stored: dict[str, torch.Tensor], folder: Path, shards: int) -> None:
    """Spreads the tensors over files in turn, against their order, and writes an index."""
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    where = {name: names[i % shards] for i, name in enumerate(stored)}
    for file in names:
        part = {name: tensor for name, tensor in stored.items() if where[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def with_weights(oracle: Any, weights: dict[str, torch.Tensor], folder: Path) -> Any:
    """Returns transformers' model with other weights, given under the names in files."""
    from transformers import AutoModelForCausalLM

    oracle.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval().requires_grad_(False)
