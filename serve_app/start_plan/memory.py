"""MemoryPlan: the bytes of the weights and of the KV cache, from config.json and the settings."""

from dataclasses import dataclass

from serve_app.config.sections import EngineSettings
from serve_app.config.settings import ConfigError
from serve_app.engine.step_sizes import MAX_PIECE, MAX_SCORED_TOKENS, capture_sizes
from serve_app.errors import ModelLoadFailed
from serve_app.model.checkpoint.shards import FLOAT_DTYPES, ITEM_BYTES
from serve_app.model.config import MixtralConfig
from serve_app.model.footprint import (
    decode_bytes,
    kernel_step_bytes,
    kv_bytes,
    logits_bytes,
    torch_step_bytes,
    trial_bytes,
    weight_bytes,
)
from serve_app.model.quantization import Quantization
from serve_app.start_plan.device import Device, Dtype

CPU_CONTEXTS = 4
"""Number of full contexts in the KV cache on a CPU, if the settings leave its size open."""
UNPLANNED_BYTES = 512 << 20
"""GPU memory in bytes that does not follow from the model's sizes: CUDA graphs, the workspaces of
cuBLAS (32 MiB per stream on an H200), and fragments in torch's allocator."""
LARGE_GPU_BYTES = 40 * 10**9
"""A GPU with at least this many bytes can run steps of 8,192 tokens, and hold all experts of a
layer as floats, beside the weights."""
BATCHED_TOKENS = {"large GPU": 8192, "GPU": 2048, "CPU": 512}
"""Default of `engine.max_num_batched_tokens`. On a GPU, each step with more than a few hundred
prompt tokens unpacks all weights, so few large steps are faster. On a CPU larger steps gain
nothing."""
SMALL_EXPERTS_AT_ONCE = 2
"""Number of experts whose weights a smaller GPU holds as floats at a time: 0.8 GB for Mixtral 8x7B.
A large GPU holds all experts of a layer in 2.9 GB, so that unpacking a layer takes 4 launches
instead of 10."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The memory that a start needs on its device."""

    weights: dict[str, int]
    """Bytes of `experts`, `attention`, `head` and `other`."""
    kind: str
    """The storage of the weights, for users: "nf4 with bfloat16 absmax", "float32"."""
    is_quantized: bool
    max_model_len: int
    """Maximum length of a sequence, in tokens."""
    token_bytes: int
    """Bytes of KV cache for one token."""
    kv_cache_tokens: int | None
    """Number of tokens in the KV cache, in whole blocks; None: as many as fit into the GPU's
    memory."""
    kv_cache_rule: str | None
    """The reason for that size, for users; None if the settings set it."""
    gpu_memory_utilization: float
    """Share of the GPU's memory that this server may use."""
    device: Device
    asked_batched_tokens: int | None
    """`engine.max_num_batched_tokens`; None if it is not set."""
    max_num_seqs: int
    config: MixtralConfig
    item_bytes: int
    """Bytes of a float weight."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(self.weights.values())

    def kv_bytes(self, num_tokens: int) -> int:
        """Returns the bytes of a KV cache for `num_tokens` tokens."""
        return num_tokens * self.token_bytes

    def max_num_batched_tokens(self, total_bytes: int) -> int:
        """Returns the maximum number of tokens in one step on a GPU with `total_bytes`, which a CPU
        ignores."""
        if self.asked_batched_tokens is not None:
            return self.asked_batched_tokens
        kind = "large GPU" if total_bytes >= LARGE_GPU_BYTES else "GPU"
        size = BATCHED_TOKENS["CPU" if self.device == "cpu" else kind]
        return max(size, self.max_num_seqs)

    def reserved_bytes(self, total_bytes: int) -> int:
        """Returns the GPU memory kept for everything but weights and KV cache.

        It is the sum of the largest step or the trial of its kernels, the logits with the tensors
        computed from them, the decode steps, and `UNPLANNED_BYTES`.
        """
        rows, sizes = self.max_num_seqs, (self.config, self.item_bytes)
        captured = capture_sizes(rows)
        scored = min(MAX_SCORED_TOKENS, self.max_num_batched_tokens(total_bytes))
        return (
            self._largest_step_bytes(total_bytes)
            + logits_bytes(*sizes, rows, scored, min(MAX_PIECE, scored))
            + decode_bytes(*sizes, captured[-1], sum(captured))
            + UNPLANNED_BYTES
        )

    def _largest_step_bytes(self, total_bytes: int) -> int:
        """Returns the bytes of a step's intermediate results.

        The bytes suffice for the kernels and for plain torch: the plan is made before the trial of
        the kernels, and plain torch replaces a kernel that fails.
        """
        num_tokens, sizes = self.max_num_batched_tokens(total_bytes), (self.config, self.item_bytes)
        form = torch_step_bytes(*sizes, self.max_model_len, is_quantized=self.is_quantized)
        if not self.is_quantized:
            return form.of(num_tokens)
        at_once = self.experts_at_once(total_bytes)
        kernels = kernel_step_bytes(*sizes, at_once).of(num_tokens)
        return max(form.of(num_tokens), kernels, trial_bytes(*sizes, at_once))

    def experts_at_once(self, total_bytes: int) -> int:
        """Returns the number of experts that a step with prompt tokens holds as floats at a time,
        on a GPU with `total_bytes`."""
        num_experts = self.config.num_local_experts
        return (
            num_experts
            if total_bytes >= LARGE_GPU_BYTES
            else min(SMALL_EXPERTS_AT_ONCE, num_experts)
        )

    def kv_room_bytes(self, free_bytes: int, total_bytes: int) -> int:
        """Returns the bytes of a GPU that the KV cache may use; negative if there are none.

        The share 1 - `gpu_memory_utilization` of the whole GPU stays unused, and `reserved_bytes`
        are kept free. Example: a GPU of 80 GB with 50 GB free, a utilization of 0.9 and 3 GB
        reserved gives 50 - 8 - 3 = 39 GB.
        """
        unused = int(total_bytes * (1 - self.gpu_memory_utilization))
        return free_bytes - unused - self.reserved_bytes(total_bytes)

    def fitting_kv_tokens(self, free_bytes: int, total_bytes: int) -> int:
        """Returns the number of KV cache tokens that fit into a GPU on which the weights are
        loaded."""
        return max(self.kv_room_bytes(free_bytes, total_bytes), 0) // self.token_bytes


def plan_memory(
    engine: EngineSettings,
    config: MixtralConfig,
    quantization: Quantization | None,
    quantize_lm_head: bool,
    device: Device,
    dtype: Dtype,
    float_modules: frozenset[str] = frozenset(),
) -> MemoryPlan:
    """Returns the memory plan of a model with `config` and weights stored as `quantization`.

    `float_modules` are the experts and attention that stay floats, see `Checkpoint.float_modules`.
    Raises `ModelLoadFailed` if the context is longer than the model was trained for, and
    `ConfigError` if the KV cache does not hold one context.
    """
    kind = str(dtype)
    if quantization is not None:
        kind = f"{quantization.quant_type} with {quantization.absmax} absmax"
    item_bytes = ITEM_BYTES[FLOAT_DTYPES[dtype]]
    context = _max_model_len(engine, config.max_position_embeddings)
    kv_cache_tokens, rule = _kv_cache_tokens(engine, context, device)
    return MemoryPlan(
        weights=weight_bytes(config, item_bytes, quantization, quantize_lm_head, float_modules),
        kind=kind,
        is_quantized=quantization is not None,
        max_model_len=context,
        token_bytes=kv_bytes(config, 1, item_bytes),
        kv_cache_tokens=kv_cache_tokens,
        kv_cache_rule=rule,
        gpu_memory_utilization=engine.gpu_memory_utilization,
        device=device,
        asked_batched_tokens=engine.max_num_batched_tokens,
        max_num_seqs=engine.max_num_seqs,
        config=config,
        item_bytes=item_bytes,
    )


def _max_model_len(engine: EngineSettings, trained: int) -> int:
    max_model_len = engine.max_model_len
    if max_model_len is not None and max_model_len > trained:
        raise ModelLoadFailed(
            f"`engine.max_model_len` is {max_model_len}, but the model was trained for {trained} "
            "tokens; lower it."
        )
    return max_model_len or trained


def _kv_cache_tokens(
    engine: EngineSettings, context: int, device: Device
) -> tuple[int | None, str | None]:
    """Returns the size of the KV cache in tokens (whole blocks) or None, and the rule for it.

    The rule is None if the settings set the size.
    """
    num_tokens, rule = engine.kv_cache_tokens, None
    if num_tokens is None and device == "cuda":
        return None, f"what {engine.gpu_memory_utilization:.0%} of the GPU's memory leaves"
    if num_tokens is None:
        num_tokens = CPU_CONTEXTS * context
        rule = f"{CPU_CONTEXTS} contexts, the default on a CPU"
    num_tokens = num_tokens // engine.block_size * engine.block_size
    if num_tokens < context:
        raise ConfigError(
            f"`engine.kv_cache_tokens` is {num_tokens:,} in whole blocks, less than the context of "
            f"{context:,} tokens; raise it, or lower `engine.max_model_len`."
        )
    return num_tokens, rule


def in_gb(num_bytes: int) -> str:
    """Returns a size in words, such as "25.20 GB" or "4.2 MB"."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"
