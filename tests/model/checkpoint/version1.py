"""Writes checkpoints of our own form as version 1 had them: row by row, with the source's absmax.

The bytes are made from bitsandbytes' files alone, without the product's code for weights.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from serve_app.model.checkpoint.fused_writer import _checksums, write_tensors
from serve_app.model.quantization import Quantization

ATTENTION, EXPERTS = "model.layers.{}.self_attn", "model.layers.{}.block_sparse_moe.experts"
SUFFIXES = {"packed": "", "absmax": ".absmax", "nested_absmax": ".nested_absmax"}
Parts = list[dict[str, Tensor]]


def write_version_1(bnb4: Path, folder: Path) -> None:
    """Converts the checkpoint in folder `bnb4`, which has bitsandbytes' 4 bits, into `folder`."""
    weights: dict[str, Tensor] = {}
    for file in bnb4.glob("*.safetensors"):
        weights |= load_file(file)
    document = json.loads((bnb4 / "config.json").read_text())
    stored = document["quantization_config"]
    is_nested = stored["bnb_4bit_use_double_quant"]
    how = Quantization(stored["bnb_4bit_quant_type"], "nested" if is_nested else "float32")
    layers, experts = document["num_hidden_layers"], document["num_local_experts"]
    files = [_layer(weights, layer, experts) for layer in range(layers)]
    code = next(name for name in weights if name.endswith(".quant_map"))
    rest = {
        name: tensor
        for name, tensor in weights.items()
        if name.split(".")[1] in ("embed_tokens", "norm") or name == "lm_head.weight"
    }
    rest["quantization.code"] = weights[code]
    if is_nested:
        rest["quantization.nested_code"] = weights[code.replace("quant_map", "nested_quant_map")]
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate([*files, rest], 1):
        name = f"model-{number:05}-of-{layers + 1:05}.safetensors"
        made = {key: tensor.contiguous() for key, tensor in tensors.items()}
        sums = " ".join(f"{crc:08x}" for crc in _checksums(list(made.values())))
        write_tensors(folder / name, made, {"crc32": sums, "source": "a test"})
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    document["quantization_config"] = {
        "quant_method": "mixtral-serve",
        "version": 1,
        "quant_type": how.quant_type,
        "absmax": how.absmax,
        "blocksize": 64,
    }
    (folder / "config.json").write_text(json.dumps(document))


def _layer(weights: dict[str, Tensor], layer: int, experts: int) -> dict[str, Tensor]:
    attention, moe = ATTENTION.format(layer), EXPERTS.format(layer)
    ours = f"model.layers.{layer}.mlp.experts"
    every = range(experts)
    names: dict[str, list[list[str]]] = {
        f"{attention}.qkv": [[f"{attention}.{one}_proj.weight" for one in "qkv"]],
        f"{attention}.o": [[f"{attention}.o_proj.weight"]],
        f"{ours}.gate_up": [[f"{moe}.{e}.{w}.weight" for w in ("w1", "w3")] for e in every],
        f"{ours}.down": [[f"{moe}.{e}.w2.weight"] for e in every],
    }
    tensors: dict[str, Tensor] = {}
    for name, stack in names.items():
        matrices = [_matrix(weights, parts, name.endswith("gate_up")) for parts in stack]
        for key in matrices[0]:
            stacked = torch.stack([matrix[key] for matrix in matrices])
            tensors[f"{name}.{key}"] = stacked if "experts" in name else stacked[0]
    prefix = f"model.layers.{layer}."
    tensors |= {key: it for key, it in weights.items() if key.startswith(prefix) and "norm" in key}
    router = weights[f"{prefix}block_sparse_moe.gate.weight"]
    return tensors | {f"{prefix}mlp.gate.weight": router}


def _matrix(weights: dict[str, Tensor], names: list[str], interleaved: bool) -> dict[str, Tensor]:
    """Returns the buffers of one matrix made of parts, by turns of 8 rows where it is
    interleaved."""
    states = [_state(weights, name) for name in names]
    made: dict[str, Tensor] = {}
    for key, suffix in (("packed", ""), ("absmax", ".absmax")):
        rows = [
            weights[name + suffix].view(
                torch.uint8 if key == "packed" else weights[name + suffix].dtype
            )
            for name in names
        ]
        parts = [it.reshape(state["shape"][0], -1) for it, state in zip(rows, states, strict=True)]
        if interleaved:
            turns = [part.view(-1, 8, part.shape[1]) for part in parts]
            made[key] = torch.stack(turns, dim=1).flatten(0, 2)
        else:
            made[key] = torch.cat(parts)
    if "nested_offset" in states[0]:
        made["nested_absmax"] = torch.cat([weights[f"{name}.nested_absmax"] for name in names])
        made["nested_offset"] = torch.tensor([state["nested_offset"] for state in states])
    return made


def _state(weights: dict[str, Tensor], name: str) -> dict[str, list[int]]:
    (blob,) = [key for key in weights if key.startswith(f"{name}.quant_state")]
    state: dict[str, list[int]] = json.loads(bytes(weights[blob].tolist()))
    return state
