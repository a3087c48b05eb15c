"""Creates the KV cache and starts the engine for a loaded model."""

import logging
from typing import TYPE_CHECKING

from serve_app.config.settings import Settings
from serve_app.errors import ModelLoadFailed
from serve_app.loading.device import explained_lack_of_memory
from serve_app.machine.host import num_cores
from serve_app.start_plan.memory import MemoryPlan
from serve_app.start_plan.plan import StartPlan

if TYPE_CHECKING:
    import torch

    from serve_app.engine.engine import Engine
    from serve_app.engine.engine_config import EngineConfig
    from serve_app.model.mixtral import Mixtral

log = logging.getLogger(__name__)


def start_engine(
    settings: Settings,
    plan: StartPlan,
    model: "Mixtral",
    device: "torch.device",
    eos_token_ids: frozenset[int],
) -> tuple["Engine", list[str]]:
    """Returns the running engine, and notes for users.

    Raises `ModelLoadFailed` if the memory is too small.
    """
    import torch

    from serve_app.engine.engine import Engine
    from serve_app.engine.model_runner import ModelRunner

    chosen, memory = settings.engine, plan.memory
    dtype: torch.dtype = getattr(torch, plan.dtype)
    total_bytes = torch.cuda.mem_get_info()[1] if device.type == "cuda" else 0
    max_tokens = memory.max_num_batched_tokens(total_bytes)
    num_blocks, notes = _num_kv_blocks(memory, chosen.block_size)
    num_tokens = num_blocks * chosen.block_size
    purpose, needed = f"a KV cache of {num_tokens} tokens", memory.kv_bytes(num_tokens)
    with explained_lack_of_memory(purpose, needed, device, "lower `engine.kv_cache_tokens`"):
        sizes = (num_blocks, chosen.block_size)
        runner = ModelRunner(
            model,
            *sizes,
            dtype,
            device,
            max_num_seqs=chosen.max_num_seqs,
            experts_at_once=memory.experts_at_once(total_bytes),
            enforce_eager=chosen.enforce_eager,
            max_threads=chosen.num_threads or num_cores(),
        )
    notes += runner.notes
    engine = Engine(runner, _engine_config(settings, memory, num_blocks, max_tokens, eos_token_ids))
    engine.start()
    return engine, notes


def _engine_config(
    settings: Settings,
    memory: MemoryPlan,
    num_blocks: int,
    max_num_batched_tokens: int,
    eos_token_ids: frozenset[int],
) -> "EngineConfig":
    from serve_app.engine.engine_config import EngineConfig

    chosen = settings.engine
    return EngineConfig(
        max_model_len=memory.max_model_len,
        max_num_seqs=chosen.max_num_seqs,
        max_waiting=chosen.max_waiting,
        block_size=chosen.block_size,
        num_blocks=num_blocks,
        max_num_batched_tokens=max_num_batched_tokens,
        eos_token_ids=eos_token_ids,
        max_stall_s=chosen.max_stall_s,
        prefill_share=chosen.prefill_share,
        step_timeout_s=chosen.step_timeout_s,
        retry_after_s=settings.api.retry_after_s,
        enable_prefix_caching=chosen.enable_prefix_caching,
    )


def _num_kv_blocks(memory: MemoryPlan, block_size: int) -> tuple[int, list[str]]:
    """Returns the number of KV blocks and notes for users. The weights must be on the device."""
    num_tokens = memory.kv_cache_tokens
    if num_tokens is None:
        import torch

        torch.cuda.empty_cache()  # frees temporary memory of the load
        num_tokens = memory.fitting_kv_tokens(*torch.cuda.mem_get_info())
    num_blocks = num_tokens // block_size
    if num_blocks * block_size < memory.max_model_len:
        raise ModelLoadFailed(
            f"The KV cache holds {num_blocks * block_size} tokens, which is less than the "
            f"context of {memory.max_model_len}; lower `engine.max_model_len` or raise "
            "`engine.kv_cache_tokens`."
        )
    if memory.kv_cache_rule is None:
        return num_blocks, []
    return num_blocks, [f"KV cache of {num_tokens} tokens: {memory.kv_cache_rule}"]
