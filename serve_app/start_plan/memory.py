"""How much memory a configuration takes, and whether this machine has it.

Computed from config.json and the settings alone, with `gpus` and `host` for the machine: imports no
torch, and answers before a weight is read or downloaded.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from serve_app.config.settings import ConfigError, Settings
from serve_app.errors import MachineUnfit
from serve_app.machine.gpus import MIB, Gpu, find_gpus
from serve_app.machine.host import free_bytes
from serve_app.model.config import MixtralConfig
from serve_app.model.footprint import kv_bytes, weight_bytes
from serve_app.start_plan.kv_size import CPU_CONTEXTS, RESERVED_BYTES

if TYPE_CHECKING:
    from serve_app.model.quantization import Quantization

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
CUDA_BYTES = 600 * MIB
"""What CUDA itself and torch's libraries take of a GPU."""


@dataclass(frozen=True)
class Need:
    """What the settings ask for."""

    weights: dict[str, int]
    """Bytes by part."""
    kind: str
    """Of the weights, for people: "nf4 with bfloat16 absmax"."""
    context: int
    """Tokens of the longest request."""
    token_bytes: int
    """Of KV cache."""
    kv_tokens: int | None
    """Tokens of KV cache; None is what the memory leaves."""

    @property
    def weight_bytes(self) -> int:
        return sum(self.weights.values())

    def kv_bytes(self, num_tokens: int) -> int:
        return num_tokens * self.token_bytes


def plan_memory(
    settings: Settings, config: MixtralConfig, quantization: "Quantization | None", context: int
) -> list[str]:
    """What weights and KV cache take, a line each; `quantization` is that of the weights in memory.

    Raises `MachineUnfit` where this machine does not have it.
    """
    gpus = [] if settings.model.device == "cpu" else find_gpus()
    is_tiny = settings.model.name == "tiny"  # for which `auto` reserves no GPU, see app.py
    on_cpu = settings.model.device == "cpu" or (
        settings.model.device == "auto" and not gpus and is_tiny
    )
    need = compute_need(settings, config, quantization, context, on_cpu)
    parts = ", ".join(f"{part} {in_gb(size)}" for part, size in need.weights.items())
    lines = [f"Weights: {in_gb(need.weight_bytes)} of {need.kind} ({parts})."]
    if on_cpu:
        if settings.model.device == "auto":
            lines.append("Device: there is no GPU on this machine, so the CPU computes.")
        return [*lines, _fit_cpu(need)]
    if not gpus:
        raise MachineUnfit(
            f"`model.device` is {settings.model.device}, but NVML finds no GPU on this "
            f"machine; this model takes one with {in_gb(need.weight_bytes)} for its weights and "
            "more for the KV cache. Set `model.device` to cpu to do without.",
            check="gpu",
        )
    gpu = min(gpus, key=lambda gpu: gpu.free_bytes)  # a replica may get any of them
    if not gpu.total_bytes:
        return [*lines, f"GPU: {gpu.name} does not say how much memory it has; the load will tell."]
    return [*lines, _fit_gpu(settings, need, gpu)]


def compute_need(
    settings: Settings,
    config: MixtralConfig,
    quantization: "Quantization | None",
    context: int,
    on_cpu: bool,
) -> Need:
    """The sizes, from the settings and the checkpoint's configuration.

    Raises `ConfigError` where the KV cache could not hold one full context.
    """
    dtype: str = settings.model.dtype
    if dtype == "auto":
        dtype = "float32" if on_cpu else "bfloat16"
    item_bytes = ITEM_BYTES[dtype]
    kind = dtype
    if quantization is not None:
        kind = f"{quantization.quant_type} with {quantization.absmax} absmax"
    block, kv_tokens = settings.engine.block_size, settings.engine.kv_cache_tokens
    if kv_tokens is None and on_cpu:
        kv_tokens = CPU_CONTEXTS * context
    if kv_tokens is not None:
        kv_tokens = kv_tokens // block * block
    if kv_tokens is not None and kv_tokens < context:
        raise ConfigError(
            f"`engine.kv_cache_tokens` is {kv_tokens:,} in whole blocks, less than the context of "
            f"{context:,} tokens; raise it, or lower `engine.max_model_len`."
        )
    weights = weight_bytes(config, item_bytes, quantization, settings.model.quantize_lm_head)
    return Need(weights, kind, context, kv_bytes(config, 1, item_bytes), kv_tokens)


def in_gb(num_bytes: int) -> str:
    """For people: "25.20 GB", "4.2 MB"."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def _fit_gpu(settings: Settings, need: Need, gpu: Gpu) -> str:
    """The line about a GPU that is large enough."""
    unused = int(gpu.total_bytes * (1 - settings.engine.gpu_memory_utilization))
    spare = RESERVED_BYTES + CUDA_BYTES
    room = gpu.free_bytes - unused - spare - need.weight_bytes
    wanted = need.kv_bytes(need.kv_tokens or need.context)
    if room < wanted:
        raise MachineUnfit(
            f"The GPU is too small: {gpu.name} has {in_gb(gpu.free_bytes)} free, of which "
            f"{in_gb(unused)} stay unused (`engine.gpu_memory_utilization`), and the model "
            f"needs {in_gb(need.weight_bytes)} for {need.kind}, {in_gb(spare)} to work "
            f"in and {in_gb(wanted)} for {need.kv_tokens or need.context:,} tokens of KV "
            f"cache; {_remedy(need, gpu, room)}.",
            check="gpu_memory",
        )
    num_tokens = need.kv_tokens or room // need.token_bytes
    return (
        f"GPU: {gpu.name} with {in_gb(gpu.free_bytes)} free, room for {num_tokens:,} tokens "
        f"of KV cache ({in_gb(need.kv_bytes(num_tokens))})."
    )


def _remedy(need: Need, gpu: Gpu, room: int) -> str:
    if room > need.kv_bytes(1024):
        return "lower `engine.max_model_len` or `engine.kv_cache_tokens`, or take a larger GPU"
    if gpu.total_bytes - gpu.free_bytes > gpu.total_bytes // 10:
        return "end what else runs on it, or take a larger GPU"
    if "absmax" in need.kind:
        return "take a larger GPU (Mixtral 8x7B: 32 GB or more)"
    return "set `model.quantization` to nf4, or take a larger GPU"


def _fit_cpu(need: Need) -> str:
    """The line about main memory that is large enough."""
    num_tokens = need.kv_tokens or 0
    kv_cache = need.kv_bytes(num_tokens)
    if need.weight_bytes + kv_cache > (free := free_bytes()):
        raise MachineUnfit(
            f"The model needs {in_gb(need.weight_bytes + kv_cache)} of memory "
            f"({in_gb(need.weight_bytes)} of them for {need.kind} weights) and "
            f"{in_gb(free)} are free; lower `engine.kv_cache_tokens`, or take a machine with "
            "more memory.",
            check="memory",
        )
    return (
        f"Memory: {in_gb(free)} free, and {in_gb(kv_cache)} for {num_tokens:,} tokens of KV cache."
    )
