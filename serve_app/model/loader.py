"""A checkpoint's folder becomes a model on a device, tensor by tensor.

Peak memory is the model plus one tensor. Everything that can be wrong with the files is found by
`inspect` before the first weight is read. Knows no settings and quantises nothing.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from serve_app.errors import ModelLoadFailed
from serve_app.model.checkpoint import PARTS, Plan, inspect
from serve_app.model.find import find_checkpoint

# `serve_app.check` uses `inspect` and must answer before torch is even imported.
if TYPE_CHECKING:
    import torch

    from serve_app.model.mixtral import Block, Mixtral

__all__ = ["Plan", "bytes_by_part", "find_checkpoint", "inspect", "load"]

Progress = Callable[[str, float], None]
"""Called with a phase's name and how much of it is done, from 0 to 1."""


def load(
    path: Path,
    *,
    dtype: "torch.dtype",
    device: "torch.device",
    progress: Progress | None = None,
) -> "Mixtral":
    """The model in folder `path`, in `dtype` on `device`.

    Raises `ModelLoadFailed` as `inspect` does, and when a file changes under our hands.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    from serve_app.model.mixtral import Mixtral

    tell = progress or (lambda phase, done: None)
    tell("checkpoint", 0.0)
    plan = inspect(path)
    tell("checkpoint", 1.0)
    with torch.device("meta"):
        model = Mixtral(plan.config).to(dtype)
    model.to_empty(device=device)
    model.rope.fill()

    total = sum(plan.parameters.values())
    done = 0
    files: dict[Path, list[str]] = {}
    for name, tensor in plan.tensors.items():
        files.setdefault(tensor.file, []).append(name)
    for file, names in files.items():
        try:
            with safe_open(file, framework="pt", device="cpu") as weights:
                for name in names:
                    place = _place(model, name)
                    place.copy_(weights.get_tensor(name))
                    done += place.numel()
                    tell("weights", done / total)
        except (OSError, SafetensorError) as error:
            raise ModelLoadFailed(f"{file}: cannot be read ({error}).") from None
    return model


def bytes_by_part(model: "Mixtral") -> dict[str, int]:
    """Bytes of the weights in memory: `{"experts", "attention", "head", "other"}`.

    "head" is the embedding matrix and the output head (one, when they are tied); "other" the
    routers, the norms and the rotary tables.
    """
    sizes = dict.fromkeys(PARTS, 0)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        sizes[_part(name)] += tensor.nbytes
    return sizes


def _part(name: str) -> str:
    if ".experts." in name:
        return "experts"
    if ".attention." in name:
        return "attention"
    return "head" if name in ("embedding", "head") else "other"


def _place(model: "Mixtral", name: str) -> "torch.Tensor":
    """The part of the model's memory that tensor `name` of a checkpoint belongs to."""
    match name.split("."):
        case ["model", "layers", index, *rest]:
            block: Block = model.blocks[int(index)]  # type: ignore[assignment]
            return _place_in_block(block, rest)
        case ["model", "embed_tokens", "weight"]:
            return model.embedding
        case ["model", "norm", "weight"]:
            return model.norm.weight
        case ["lm_head", "weight"] if model.head is not None:
            return model.head
    raise AssertionError(f"inspect let {name} through")


def _place_in_block(block: "Block", rest: list[str]) -> "torch.Tensor":
    attention, experts = block.attention, block.mlp.experts
    queries = attention.num_heads * attention.head_dim
    keys = attention.num_kv_heads * attention.head_dim
    inner = experts.down.shape[2]
    match rest:
        case ["input_layernorm", "weight"]:
            return block.attention_norm.weight
        case ["post_attention_layernorm", "weight"]:
            return block.mlp_norm.weight
        case ["self_attn", "q_proj", "weight"]:
            return attention.qkv[:queries]
        case ["self_attn", "k_proj", "weight"]:
            return attention.qkv[queries : queries + keys]
        case ["self_attn", "v_proj", "weight"]:
            return attention.qkv[queries + keys :]
        case ["self_attn", "o_proj", "weight"]:
            return attention.o
        case ["block_sparse_moe" | "mlp", "gate", "weight"]:
            return block.mlp.router
        case ["mlp", "experts", "gate_up_proj"]:
            return experts.gate_up
        case ["mlp", "experts", "down_proj"]:
            return experts.down
        case ["block_sparse_moe", "experts", expert, "w1", "weight"]:
            return experts.gate_up[int(expert), :inner]
        case ["block_sparse_moe", "experts", expert, "w3", "weight"]:
            return experts.gate_up[int(expert), inner:]
        case ["block_sparse_moe", "experts", expert, "w2", "weight"]:
            return experts.down[int(expert)]
    raise AssertionError(f"inspect let {'.'.join(rest)} through")
