"""Compares the memory that a `StartPlan` needs with the memory of this machine.

The process that starts Ray makes this comparison first. It queries the GPU through NVML, so that
only the replica creates a CUDA context.
"""

from serve_app.config.settings import hides_gpus
from serve_app.errors import MachineUnfit
from serve_app.machine.gpus import MIB, Gpu, find_gpus
from serve_app.machine.host import free_bytes
from serve_app.start_plan.memory import MemoryPlan, in_gb
from serve_app.start_plan.plan import StartPlan

CUDA_BYTES = 600 * MIB
"""GPU memory that the CUDA context and torch's libraries need, in bytes."""


def require_memory(plan: StartPlan) -> list[str]:
    """Returns lines for users: the memory that weights and KV cache need, and the free memory.

    Raises `MachineUnfit` if this machine lacks the memory or the GPU.
    """
    memory = plan.memory
    parts = ", ".join(f"{part} {in_gb(size)}" for part, size in memory.weights.items())
    lines = [f"Weights: {in_gb(memory.weight_bytes)} of {memory.kind} ({parts})."]
    if plan.device == "cpu":
        if plan.asked_device == "auto":
            lines.append("Device: the CPU, because the tiny model needs no GPU.")
        return [*lines, _require_main_memory(memory)]
    gpus = find_gpus()
    if not gpus:
        raise MachineUnfit(
            f"`model.device` is {plan.asked_device}, but NVML finds no GPU on this "
            f"machine; this model needs one with {in_gb(memory.weight_bytes)} for its weights and "
            "more for the KV cache. Set `model.device` to cpu to run without one.",
            check="gpu",
        )
    # A replica may get any GPU, so the one with the least memory decides. `CUDA_VISIBLE_DEVICES`
    # counts GPUs in CUDA's order, which NVML does not know: then the GPU with the most memory
    # decides, and the load checks the real one.
    choose = max if hides_gpus() else min
    gpu = choose(gpus, key=lambda gpu: gpu.free_bytes)
    if not gpu.total_bytes:
        return [*lines, f"GPU: {gpu.name} does not report its memory; the load will check it."]
    return [*lines, _require_gpu_memory(memory, gpu)]


def _require_gpu_memory(memory: MemoryPlan, gpu: Gpu) -> str:
    """Returns a line about the GPU. Raises `MachineUnfit` if it is too small."""
    free = gpu.free_bytes - CUDA_BYTES - memory.weight_bytes
    room = memory.kv_room_bytes(free, gpu.total_bytes)
    wanted_tokens = memory.kv_cache_tokens or memory.max_model_len
    if room < memory.kv_bytes(wanted_tokens):
        unused = int(gpu.total_bytes * (1 - memory.gpu_memory_utilization))
        raise MachineUnfit(
            f"The GPU is too small: {gpu.name} has {in_gb(gpu.free_bytes)} free, of which "
            f"{in_gb(unused)} stay unused (`engine.gpu_memory_utilization`), but the model "
            f"needs {in_gb(memory.weight_bytes)} for {memory.kind}, "
            f"{in_gb(memory.reserved_bytes(gpu.total_bytes) + CUDA_BYTES)} for computations and "
            f"{in_gb(memory.kv_bytes(wanted_tokens))} for {wanted_tokens:,} tokens of KV "
            f"cache; {_remedy(memory, gpu, room)}.",
            check="gpu_memory",
        )
    num_tokens = memory.kv_cache_tokens or room // memory.token_bytes
    return (
        f"GPU: {gpu.name} with {in_gb(gpu.free_bytes)} free, room for {num_tokens:,} tokens "
        f"of KV cache ({in_gb(memory.kv_bytes(num_tokens))})."
    )


def _remedy(memory: MemoryPlan, gpu: Gpu, room: int) -> str:
    if room > memory.kv_bytes(1024):
        return "lower `engine.max_model_len` or `engine.kv_cache_tokens`, or use a larger GPU"
    if gpu.total_bytes - gpu.free_bytes > gpu.total_bytes // 10:
        return "end the other programs on it, or use a larger GPU"
    if memory.is_quantized:
        return "use a larger GPU (Mixtral 8x7B: 32 GB or more)"
    return "set `model.quantization` to nf4, or use a larger GPU"


def _require_main_memory(memory: MemoryPlan) -> str:
    """Returns a line about main memory. Raises `MachineUnfit` if it is too small."""
    num_tokens = memory.kv_cache_tokens or 0
    kv_cache = memory.kv_bytes(num_tokens)
    if memory.weight_bytes + kv_cache > (free := free_bytes()):
        raise MachineUnfit(
            f"The model needs {in_gb(memory.weight_bytes + kv_cache)} of memory "
            f"({in_gb(memory.weight_bytes)} of them for {memory.kind} weights), but only "
            f"{in_gb(free)} are free; lower `engine.kv_cache_tokens`, or use a machine with "
            "more memory.",
            check="memory",
        )
    return (
        f"Memory: {in_gb(free)} free, and {in_gb(kv_cache)} for {num_tokens:,} tokens of KV cache."
    )
