"""The least bytes that a decode step has to read, hence the most tokens per second.

Weights once for all tokens of a step, of the experts only those that are hit, and every sequence's
keys and values. Arithmetic is ignored: for a decode it is hidden behind the memory, save in large
batches on small GPUs.
"""

from serve_app.model.config import MixtralConfig
from serve_app.model.footprint import weight_bytes
from serve_app.model.quantization import Quantization


def experts_hit(config: MixtralConfig, batch: int) -> float:
    """Experts of a layer that `batch` tokens go to, by chance and all alike."""
    missed = (1 - config.num_experts_per_tok / config.num_local_experts) ** batch
    return config.num_local_experts * (1 - missed)


def decode_bytes(
    config: MixtralConfig,
    quantization: Quantization | None,
    batch: int,
    context: int,
    item_bytes: int,
) -> float:
    """Bytes of one step of `batch` sequences with `context` tokens each."""
    parts = weight_bytes(config, item_bytes, quantization)
    head = config.vocab_size * config.hidden_size * item_bytes  # the embedding is only looked up
    experts = parts["experts"] * experts_hit(config, batch) / config.num_local_experts
    kv = batch * context * config.kv_values_per_token * item_bytes
    return experts + parts["attention"] + parts["other"] + head + kv


def decode_limit(
    config: MixtralConfig,
    quantization: Quantization | None,
    batch: int,
    context: int,
    item_bytes: int,
    bandwidth: float,
) -> float:
    """Tokens per second, all sequences together, at so many bytes per second."""
    return batch * bandwidth / decode_bytes(config, quantization, batch, context, item_bytes)


def prefill_flops(config: MixtralConfig) -> float:
    """Operations per token in matrix products; attention, which is little, is not counted."""
    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    attention = hidden * (2 * heads + 2 * keys)
    experts = config.num_experts_per_tok * 3 * hidden * config.intermediate_size
    return (
        2.0 * config.num_hidden_layers * (attention + experts + config.num_local_experts * hidden)
    )
