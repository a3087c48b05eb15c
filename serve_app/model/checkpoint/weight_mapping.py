"""A checkpoint's tensor, by its name, becomes part of a model in memory.

Knows what the names mean; how a weight is stored, the modules know (`put`). Reads no files.
"""

import torch
from torch import Tensor

from serve_app.errors import ModelLoadFailed
from serve_app.model.mixtral import Block, Mixtral
from serve_app.model.nf4 import Quantized

EXPERT_MATRICES = {"w1": "gate", "w2": "down", "w3": "up"}


def put(model: Mixtral, name: str, weight: Tensor | Quantized) -> None:
    """Fills the part of `model` that has `name` in `expected_shapes`, one tensor per expert.

    A model in 4 bits takes floats, which it quantises, or what is quantised already.
    """
    match name.split("."):
        case ["model", "layers", index, *rest]:
            block: Block = model.blocks[int(index)]  # type: ignore[assignment]
            _put_in_block(block, rest, weight)
        case ["model", "embed_tokens", "weight"] if isinstance(weight, Tensor):
            model.embedding.copy_(weight)
        case ["model", "norm", "weight"] if isinstance(weight, Tensor):
            model.norm.weight.copy_(weight)
        case ["lm_head", "weight"] if model.head is not None:
            put_head(model, weight)
        case _:
            raise AssertionError(f"inspect let {name} through")


def put_head(model: Mixtral, weight: Tensor | Quantized) -> None:
    """Fills the output head, which comes after all other weights.

    Raises `ModelLoadFailed` where it would be quantised with other tables than those are.
    """
    assert model.head is not None
    tables = [] if model.codes is None else list(model.codes.buffers())
    before = [table.clone() for table in tables]
    model.head.put(0, weight)
    if not all(map(torch.equal, before, tables)):
        raise ModelLoadFailed(
            "The head cannot be quantised as the checkpoint's weights are: its tables are other "
            "than ours; set `model.quantize_lm_head` to false."
        )


def _put_in_block(block: Block, rest: list[str], weight: Tensor | Quantized) -> None:
    attention, experts = block.attention, block.mlp.experts
    match rest:
        case ["self_attn", "q_proj" | "k_proj" | "v_proj" as projection, "weight"]:
            attention.qkv.put("qkv".index(projection[0]), weight)
        case ["self_attn", "o_proj", "weight"]:
            attention.o.put(0, weight)
        case ["block_sparse_moe", "experts", expert, "w1" | "w2" | "w3" as matrix, "weight"]:
            experts.put(int(expert), EXPERT_MATRICES[matrix], weight)
        case ["block_sparse_moe", "gate", "weight"] if isinstance(weight, Tensor):
            block.mlp.router.copy_(weight)
        case ["input_layernorm", "weight"] if isinstance(weight, Tensor):
            block.attention_norm.weight.copy_(weight)
        case ["post_attention_layernorm", "weight"] if isinstance(weight, Tensor):
            block.mlp_norm.weight.copy_(weight)
        case _:
            raise AssertionError(f"inspect let {'.'.join(rest)} through")
