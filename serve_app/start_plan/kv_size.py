"""How many tokens the engine holds: the context of one sequence, and the KV cache of all.

Where the settings leave it open, what the device has room for. Knows no engine.
"""

from typing import TYPE_CHECKING

from serve_app.config.sections import EngineSettings
from serve_app.config.settings import Settings
from serve_app.errors import ModelLoadFailed

if TYPE_CHECKING:
    import torch

CPU_CONTEXTS = 4
"""Contexts that the KV cache has on a CPU where the settings leave it open."""
RESERVED_BYTES = 1 << 30
"""GPU memory left to activations and the allocator when the KV cache's size is chosen."""


def max_model_len(settings: Settings, trained: int) -> int:
    """The context in tokens; `ModelLoadFailed` when the settings ask for more than was trained."""
    asked = settings.engine.max_model_len
    if asked is not None and asked > trained:
        raise ModelLoadFailed(
            f"`engine.max_model_len` is {asked}, but the checkpoint holds {trained} tokens."
        )
    return asked or trained


def kv_blocks(
    engine: EngineSettings,
    device: "torch.device",
    token_bytes: int,
    context: int,
    notes: list[str],
) -> int:
    """Blocks of the KV cache, whose tokens take `token_bytes` each; says in `notes` why so many.

    After the weights are on the device, whose free memory counts. Raises `ModelLoadFailed` where
    not even one `context` of tokens fits.
    """
    num_tokens = engine.kv_cache_tokens
    if num_tokens is None:
        num_tokens = _tokens(engine, device, token_bytes, context)
        notes.append(f"KV cache of {num_tokens} tokens: {_rule(engine, device)}")
    num_blocks = num_tokens // engine.block_size
    if num_blocks * engine.block_size < context:
        raise ModelLoadFailed(
            f"The KV cache holds {num_blocks * engine.block_size} tokens, less than the context of "
            f"{context}; lower `engine.max_model_len` or raise `engine.kv_cache_tokens`."
        )
    return num_blocks


def _tokens(engine: EngineSettings, device: "torch.device", token_bytes: int, context: int) -> int:
    import torch

    if device.type == "cpu":
        return CPU_CONTEXTS * context
    torch.cuda.empty_cache()  # of what the load needed on its way
    free, total = torch.cuda.mem_get_info()
    room = int(free - total * (1 - engine.gpu_memory_utilization)) - RESERVED_BYTES
    return max(room, 0) // token_bytes


def _rule(engine: EngineSettings, device: "torch.device") -> str:
    if device.type == "cpu":
        return "4 contexts, the default on a CPU"
    return f"what {engine.gpu_memory_utilization:.0%} of the GPU's memory leaves"
