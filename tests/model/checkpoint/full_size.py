"""Mixtral 8x7B's checkpoints in full size and without their weights: true headers, sparse files."""

import json
from math import prod
from pathlib import Path
from typing import Any

CONFIG: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
"""config.json as published with Mixtral-8x7B-Instruct-v0.1."""
BYTES = {"BF16": 2, "F32": 4, "U8": 1}
Tensors = dict[str, tuple[str, list[int], bytes]]
"""dtype, shape and the first bytes of the data."""


def floats() -> Tensors:
    """Returns the tensors of mistralai/Mixtral-8x7B-Instruct-v0.1."""
    found: dict[str, list[int]] = {"model.embed_tokens.weight": [32000, 4096]}
    for i in range(32):
        layer = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{layer}.{norm}.weight"] = [4096]
        for projection, rows in (("q", 4096), ("k", 1024), ("v", 1024), ("o", 4096)):
            found[f"{layer}.self_attn.{projection}_proj.weight"] = [rows, 4096]
        found[f"{layer}.block_sparse_moe.gate.weight"] = [8, 4096]
        for expert in range(8):
            for matrix, shape in (("w1", [14336, 4096]), ("w2", [4096, 14336])):
                found[f"{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight"] = shape
            found[f"{layer}.block_sparse_moe.experts.{expert}.w3.weight"] = [14336, 4096]
    found |= {"model.norm.weight": [4096], "lm_head.weight": [32000, 4096]}
    return {name: ("BF16", shape, b"") for name, shape in found.items()}


def in_4_bits(*, nested: bool) -> Tensors:
    """Returns the tensors of ybelkada/Mixtral-8x7B-Instruct-v0.1-bnb-4bit, or of a nested one."""
    found: Tensors = {}
    for name, (dtype, shape, _) in floats().items():
        if not any(part in name for part in ("_proj.", ".experts.")):
            found[name] = (dtype, shape, b"")
            continue
        state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16"}
        blocks = prod(shape) // 64
        found[name] = ("U8", [prod(shape) // 2, 1], b"")
        found[f"{name}.absmax"] = ("U8" if nested else "F32", [blocks], b"")
        found[f"{name}.quant_map"] = ("F32", [16], b"")
        if nested:
            found[f"{name}.nested_absmax"] = ("F32", [-(-blocks // 256)], b"")
            found[f"{name}.nested_quant_map"] = ("F32", [256], b"")
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.05}
        blob = json.dumps({**state, "shape": shape}).encode()
        found[f"{name}.quant_state.bitsandbytes__nf4"] = ("U8", [len(blob)], blob)
    return found


def write(folder: Path, tensors: Tensors, shards: int, **config: Any) -> Path:
    """Writes such a checkpoint in `shards` files of about the same size."""
    total = sum(prod(shape) * BYTES[dtype] for dtype, shape, _ in tensors.values())
    files: list[Tensors] = [{}]
    filled = 0
    for name, (dtype, shape, data) in tensors.items():
        if filled >= total * len(files) / shards:
            files.append({})
        files[-1][name] = (dtype, shape, data)
        filled += prod(shape) * BYTES[dtype]
    weight_map: dict[str, str] = {}
    for i, part in enumerate(files):
        file = f"model-{i + 1:05}-of-{len(files):05}.safetensors"
        weight_map |= dict.fromkeys(part, file)
        _write_sparse(folder / file, part)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder


def _write_sparse(file: Path, tensors: Tensors) -> None:
    header: dict[str, dict[str, Any]] = {}
    end = 0
    for name, (dtype, shape, _) in tensors.items():
        begin, end = end, end + prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, (_, _, data) in tensors.items():
            if data:
                stream.seek(8 + len(text) + header[name]["data_offsets"][0])
                stream.write(data)
        stream.truncate(8 + len(text) + end)
