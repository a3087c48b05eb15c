"""Compares the memory that a `StartPlan` needs with the memory that this machine has.

For the process that starts Ray, before it does. A free GPU is found through NVML, so no process
but the replica takes a CUDA context.
"""

from serve_app.errors import MachineUnfit
from serve_app.machine.gpus import MIB, Gpu, find_gpus
from serve_app.machine.host import free_bytes
from serve_app.start_plan.memory import MemoryPlan, in_gb
from serve_app.start_plan.plan import StartPlan

CUDA_BYTES = 600 * MIB
"""GPU memory that CUDA itself and torch's libraries take."""


def require_memory(plan: StartPlan) -> list[str]:
    """Returns what weights and KV cache take and what is free, a line each, for users.

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
            f"machine; this model takes one with {in_gb(memory.weight_bytes)} for its weights and "
            "more for the KV cache. Set `model.device` to cpu to do without.",
            check="gpu",
        )
    gpu = min(gpus, key=lambda gpu: gpu.free_bytes)  # a replica may get any of them
    if not gpu.total_bytes:
        return [*lines, f"GPU: {gpu.name} does not report its memory; only the load can find out."]
    return [*lines, _require_gpu_memory(memory, gpu)]


def _require_gpu_memory(memory: MemoryPlan, gpu: Gpu) -> str:
    """Returns the line about a GPU that is large enough."""
    free = gpu.free_bytes - CUDA_BYTES - memory.weight_bytes
    room = memory.kv_room_bytes(free, gpu.total_bytes)
    wanted_tokens = memory.kv_cache_tokens or memory.max_model_len
    if room < memory.kv_bytes(wanted_tokens):
        unused = int(gpu.total_bytes * (1 - memory.gpu_memory_utilization))
        raise MachineUnfit(
            f"The GPU is too small: {gpu.name} has {in_gb(gpu.free_bytes)} free, of which "
            f"{in_gb(unused)} stay unused (`engine.gpu_memory_utilization`), and the model "
            f"needs {in_gb(memory.weight_bytes)} for {memory.kind}, "
            f"{in_gb(memory.reserved_bytes(gpu.total_bytes) + CUDA_BYTES)} to work in and "
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
        return "lower `engine.max_model_len` or `engine.kv_cache_tokens`, or take a larger GPU"
    if gpu.total_bytes - gpu.free_bytes > gpu.total_bytes // 10:
        return "end what else runs on it, or take a larger GPU"
    if memory.is_quantized:
        return "take a larger GPU (Mixtral 8x7B: 32 GB or more)"
    return "set `model.quantization` to nf4, or take a larger GPU"


def _require_main_memory(memory: MemoryPlan) -> str:
    """Returns the line about main memory that is large enough."""
    num_tokens = memory.kv_cache_tokens or 0
    kv_cache = memory.kv_bytes(num_tokens)
    if memory.weight_bytes + kv_cache > (free := free_bytes()):
        raise MachineUnfit(
            f"The model needs {in_gb(memory.weight_bytes + kv_cache)} of memory "
            f"({in_gb(memory.weight_bytes)} of them for {memory.kind} weights) and "
            f"{in_gb(free)} are free; lower `engine.kv_cache_tokens`, or take a machine with "
            "more memory.",
            check="memory",
        )
    return (
        f"Memory: {in_gb(free)} free, and {in_gb(kv_cache)} for {num_tokens:,} tokens of KV cache."
    )
