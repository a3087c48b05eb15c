"""The least bytes that a decode step reads, hence the most tokens per second.

A step reads the weights once for all its tokens, of the experts only those that are hit, and the
keys and values of every sequence. Arithmetic is ignored: in a decode step it is hidden behind the
memory, except in large batches on small GPUs.
"""

from serve_app.model.config import MixtralConfig
from serve_app.model.footprint import weight_bytes
from serve_app.model.quantization import Quantization


def experts_hit(config: MixtralConfig, batch: int) -> float:
    """Returns the expected number of a layer's experts that `batch` tokens use, with uniform
    routing."""
    missed = (1 - config.num_experts_per_tok / config.num_local_experts) ** batch
    return config.num_local_experts * (1 - missed)


def decode_bytes(
    config: MixtralConfig,
    quantization: Quantization | None,
    batch: int,
    context: int,
    item_bytes: int,
) -> float:
    """Returns the bytes of one step of `batch` sequences with `context` tokens each."""
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
    """Returns the tokens per second of all sequences together at `bandwidth` bytes per second."""
    return batch * bandwidth / decode_bytes(config, quantization, batch, context, item_bytes)


def prefill_flops(config: MixtralConfig) -> float:
    """Returns the operations per token in matrix products. Attention is small and not counted."""
    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    attention = hidden * (2 * heads + 2 * keys)
    experts = config.num_experts_per_tok * 3 * hidden * config.intermediate_size
    return (
        2.0 * config.num_hidden_layers * (attention + experts + config.num_local_experts * hidden)
    )
