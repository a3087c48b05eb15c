"""Computes the bytes of a model in memory from its sizes. Imports no torch."""

from math import prod
from typing import NamedTuple

from serve_app.model.checkpoint.shards import ITEM_BYTES
from serve_app.model.checkpoint.tensor_names import LM_HEAD, PARTS, module_weights
from serve_app.model.config import MixtralConfig
from serve_app.model.quantization import (
    ABSMAX_DTYPES,
    GROUP_SIZE,
    Quantization,
    num_nested_groups,
)

FLOAT_BYTES = 4
"""Bytes of a float32, the type of logits and of attention's sums."""
MAX_SPLITS = 32
"""Maximum number of splits of a context in the attention of decodes; equals `MAX_SPLITS` of
`kernels/cuda/splits.cuh`. See `AttentionMemory`."""
SAMPLE_BYTES = 64
"""Bytes per logit in the torch sampler: noise in float64, sorted logits, penalties. The sampling
kernel needs 4."""
SCORE_BYTES = 9
"""Bytes per logit of the rows whose log softmax is computed at a time."""


def parameters(config: MixtralConfig) -> dict[str, int]:
    """Returns the number of parameters in each of `PARTS`."""
    counts: dict[str, int] = dict.fromkeys(PARTS, 0)
    for weight in module_weights(config):
        counts[weight.row.part] += prod(weight.shape)
    return counts


def num_quantized(
    config: MixtralConfig, quantize_lm_head: bool, float_modules: frozenset[str] = frozenset()
) -> int:
    """Returns the number of 4-bit parameters if experts and attention are quantized, except
    `float_modules`."""
    count = 0
    for module_weight in module_weights(config):
        for weight in module_weight.weights:
            in_4_bits = quantize_lm_head and weight.name == LM_HEAD
            if weight.is_quantized:
                in_4_bits = weight.module not in float_modules
            count += in_4_bits * prod(weight.shape)
    return count


def weight_bytes(
    config: MixtralConfig,
    item_bytes: int,
    quantization: Quantization | None = None,
    quantize_lm_head: bool = False,
    float_modules: frozenset[str] = frozenset(),
) -> dict[str, int]:
    """Returns the bytes of the weights in memory for each of `PARTS`.

    `item_bytes` is the size of a float weight (2 for bfloat16). With a `quantization`, experts and
    attention have 4-bit weights, except for `float_modules`; with `quantize_lm_head`, lm_head too.
    The few hundred bytes of code values and nested offsets per layer are not counted.
    """
    sizes: dict[str, int] = dict.fromkeys(PARTS, 0)
    for module_weight in module_weights(config):
        for weight in module_weight.weights:
            num_weights = prod(weight.shape)
            in_4_bits = quantize_lm_head and weight.name == LM_HEAD
            if weight.is_quantized:
                in_4_bits = weight.module not in float_modules
            if quantization is None or not in_4_bits:
                sizes[weight.part] += num_weights * item_bytes
            else:
                sizes[weight.part] += quantized_bytes(num_weights, quantization)
    return sizes


def quantized_bytes(num_weights: int, quantization: Quantization) -> int:
    """Returns the bytes of a 4-bit matrix.

    Example: a matrix [4096, 4096] with bfloat16 absmax takes 8,388,608 bytes of nibbles and 262,144
    * 2 = 524,288 bytes of absmax.
    """
    absmax_bytes = ITEM_BYTES[ABSMAX_DTYPES[quantization.absmax]]
    num_bytes = num_weights // 2 + num_weights // GROUP_SIZE * absmax_bytes
    if quantization.absmax == "nested":
        num_bytes += num_nested_groups(num_weights) * ITEM_BYTES["F32"]
    return num_bytes


class StepBytes(NamedTuple):
    """The bytes of a step's intermediate results on a GPU."""

    base: int
    """Bytes that every step takes."""
    token: int
    """Bytes that each token of the step adds."""

    def of(self, num_tokens: int) -> int:
        """Returns the bytes of a step of `num_tokens`."""
        return self.base + num_tokens * self.token


def torch_step_bytes(
    config: MixtralConfig, item_bytes: int, max_model_len: int, *, is_quantized: bool
) -> StepBytes:
    """Returns the bytes of a step's intermediate results in plain torch: the maximum of one layer.

    `base` is the keys and values of a whole context, repeated for the query heads, and, for 4-bit
    weights, one expert as floats. `token` is six vectors of hidden_size, the inputs and outputs of
    `num_experts_per_tok` experts, four vectors of intermediate_size (gate, up, silu and their
    product), and an attention mask over the context, as bools and as floats. Experts with 4-bit
    weights are computed one after the other, and one expert may get every token. Experts with float
    weights are computed together, so each token needs the vectors of intermediate_size for each of
    its experts.

    Example: with 8,192 tokens and contexts of 32,768, Mixtral 8x7B takes 0.77 + 2.4 GB with 4-bit
    weights in bfloat16.
    """
    heads = 2 * max_model_len * config.q_size * item_bytes
    expert = 2 * config.intermediate_size * config.hidden_size * item_bytes
    hidden = (6 + 2 * config.num_experts_per_tok) * config.hidden_size
    together = 1 if is_quantized else config.num_experts_per_tok
    token = (hidden + 4 * together * config.intermediate_size) * item_bytes
    base = heads + expert if is_quantized else heads
    return StepBytes(base, token + max_model_len * (1 + item_bytes))


def kernel_step_bytes(config: MixtralConfig, item_bytes: int, experts_at_once: int) -> StepBytes:
    """Returns the bytes of a prompt step whose 4-bit products run in kernels (`PromptStep`).

    `base` is `workspace_bytes`. `token` is x, its norm, the output of o, the queries, the result of
    attention, the outputs of `num_experts_per_tok` experts in this layer and in the last one, and a
    vector of intermediate_size for each of these experts.

    Example: with 8,192 tokens and all experts at once, Mixtral 8x7B takes 2.9 + 1.07 GB. With 2,048
    tokens and two experts at once it takes 0.79 + 0.27 GB.
    """
    top_k = config.num_experts_per_tok
    hidden = (3 + 2 * top_k) * config.hidden_size + 2 * config.q_size
    token = (hidden + top_k * config.intermediate_size) * item_bytes
    return StepBytes(workspace_bytes(config, item_bytes, experts_at_once), token)


def trial_bytes(config: MixtralConfig, item_bytes: int, experts_at_once: int) -> int:
    """Returns the bytes of the trial of `PromptStep` with 4-bit weights during the load.

    Plain torch computes the same prompts while the workspace is allocated. It needs gate and up of
    one expert as floats; their codes row by row and the temporary look-ups need at most as much
    again.
    """
    expert = 2 * config.intermediate_size * config.hidden_size * item_bytes
    return workspace_bytes(config, item_bytes, experts_at_once) + 2 * expert


def decode_bytes(config: MixtralConfig, item_bytes: int, max_rows: int, captured_rows: int) -> int:
    """Returns the bytes that a GPU keeps for decode steps of up to `max_rows` rows.

    Each row needs the results of attention's splits, its vectors in the largest graph, and its
    scores in the sampler. `captured_rows` is the total number of rows of all graphs; each needs its
    logits, because a graph's output stays in memory.

    Example: up to 128 rows of Mixtral 8x7B take 0.16 GB.
    """
    splits = config.num_attention_heads * MAX_SPLITS * (config.head_dim + 2) * FLOAT_BYTES
    top_k = config.num_experts_per_tok
    vectors = 4 * config.hidden_size + 2 * config.q_size + 2 * config.kv_size
    vectors += top_k * (config.intermediate_size + 2 * config.hidden_size)
    scores = config.vocab_size * (item_bytes + FLOAT_BYTES)
    logits = config.vocab_size * FLOAT_BYTES
    return max_rows * (splits + vectors * item_bytes + scores) + captured_rows * logits


def logits_bytes(
    config: MixtralConfig, item_bytes: int, sampled_rows: int, scored_rows: int, piece_rows: int
) -> int:
    """Returns the bytes of a step's logits, of sampling and of prompt scores.

    `sampled_rows` is the number of sampled tokens. `scored_rows` is the number of prompt tokens
    with log probabilities, which are computed for `piece_rows` tokens at a time (`PromptScores`).

    Example: 32 sampled and 512 scored rows of Mixtral 8x7B, 128 at a time, take 0.21 GB.
    """
    rows = (sampled_rows + scored_rows) * (item_bytes + FLOAT_BYTES)
    return config.vocab_size * (rows + sampled_rows * SAMPLE_BYTES + piece_rows * SCORE_BYTES)


def workspace_bytes(config: MixtralConfig, item_bytes: int, experts_at_once: int) -> int:
    """Returns the bytes of the unpacked weights that a prompt step holds at a time.

    They are q, k, v and o of one layer, and gate, up and down of `experts_at_once` experts.
    """
    attention = (2 * config.q_size + 2 * config.kv_size) * config.hidden_size
    expert = 3 * config.intermediate_size * config.hidden_size
    return (attention + experts_at_once * expert) * item_bytes


def kv_bytes(config: MixtralConfig, num_tokens: int, item_bytes: int) -> int:
    """Returns the bytes of a KV cache for `num_tokens` tokens."""
    return num_tokens * config.kv_values_per_token * item_bytes
