"""How many bytes a model's weights take in memory, from its sizes alone.

What a load promises before it reads anything, part by part. Imports no torch, knows no files.
"""

from math import prod

from serve_app.model.checkpoint.shards import ITEM_BYTES
from serve_app.model.config import MixtralConfig
from serve_app.model.quantization import (
    ABSMAX_DTYPES,
    GROUP_SIZE,
    Quantization,
    num_nested_groups,
)

PARTS = ("experts", "attention", "head", "other")


def expected_shapes(config: MixtralConfig, *, stacked: bool) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a float checkpoint.

    `stacked`: experts as transformers 5 has them in memory, rather than one by one.
    """
    hidden, inner, experts = config.hidden_size, config.intermediate_size, config.num_experts
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for i in range(config.num_layers):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.self_attn.q_proj.weight"] = (q, hidden)
        shapes[f"{layer}.self_attn.k_proj.weight"] = (kv, hidden)
        shapes[f"{layer}.self_attn.v_proj.weight"] = (kv, hidden)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, q)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        if stacked:
            shapes[f"{layer}.mlp.gate.weight"] = (experts, hidden)
            shapes[f"{layer}.mlp.experts.gate_up_proj"] = (experts, 2 * inner, hidden)
            shapes[f"{layer}.mlp.experts.down_proj"] = (experts, hidden, inner)
            continue
        shapes[f"{layer}.block_sparse_moe.gate.weight"] = (experts, hidden)
        for expert in range(experts):
            prefix = f"{layer}.block_sparse_moe.experts.{expert}"
            shapes[f"{prefix}.w1.weight"] = (inner, hidden)
            shapes[f"{prefix}.w2.weight"] = (hidden, inner)
            shapes[f"{prefix}.w3.weight"] = (inner, hidden)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def part_of(name: str) -> str:
    """The one of `PARTS` that a checkpoint's tensor belongs to; "head" is embedding and head."""
    if ".experts." in name:
        return "experts"
    if ".self_attn." in name:
        return "attention"
    return "head" if "embed_tokens" in name or "lm_head" in name else "other"


def parameters(config: MixtralConfig) -> dict[str, int]:
    """Parameters of each of `PARTS`."""
    counts = dict.fromkeys(PARTS, 0)
    for name, shape in expected_shapes(config, stacked=True).items():
        counts[part_of(name)] += prod(shape)
    return counts


def weight_bytes(
    config: MixtralConfig,
    item_bytes: int,
    quantization: Quantization | None = None,
    quantize_lm_head: bool = False,
) -> dict[str, int]:
    """Bytes of each of `PARTS` in memory.

    `item_bytes` is the size of a float weight (2 for bfloat16). With a `quantization` experts and
    attention are in 4 bits, and with `quantize_lm_head` lm_head too; the few hundred bytes of a
    layer's tables are not counted.
    """
    sizes = dict.fromkeys(PARTS, 0)
    for name, shape in expected_shapes(config, stacked=False).items():
        part, count = part_of(name), prod(shape)
        in_4_bits = part in ("experts", "attention") or (
            quantize_lm_head and name == "lm_head.weight"
        )
        if quantization is None or not in_4_bits:
            sizes[part] += count * item_bytes
        else:
            sizes[part] += quantized_bytes(count, quantization)
    return sizes


def quantized_bytes(num_weights: int, quantization: Quantization) -> int:
    """Bytes of a matrix of `num_weights` in 4 bits with its absmax."""
    absmax_bytes = ITEM_BYTES[ABSMAX_DTYPES[quantization.absmax]]
    size = num_weights // 2 + num_weights // GROUP_SIZE * absmax_bytes
    if quantization.absmax == "nested":
        size += num_nested_groups(num_weights) * ITEM_BYTES["F32"]
    return size


def kv_bytes(config: MixtralConfig, num_tokens: int, item_bytes: int) -> int:
    """Bytes of a KV cache for `num_tokens` tokens."""
    return num_tokens * config.kv_values_per_token * item_bytes
