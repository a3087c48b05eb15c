"""Why a process that loaded a model is gone without a word: memory, most of the time.

Compares what there was before with what the model takes. Knows no processes.
"""

import logging
from pathlib import Path

from serve_app.app import is_on_cpu
from serve_app.cold_start.load_records import KILLED
from serve_app.config.settings import ConfigError, Settings
from serve_app.errors import LoaderKilled, ModelLoadFailed
from serve_app.loading.load import find_local, wished_quantization
from serve_app.loading.phases import Phase
from serve_app.machine.host import free_bytes, num_oom_kills
from serve_app.start_plan.kv_size import max_model_len
from serve_app.start_plan.memory import compute_need, in_gb

log = logging.getLogger(__name__)

LOADER_BYTES = 4_000_000_000
"""Main memory that a load onto a GPU takes besides: CUDA, torch, and weights on their way."""


class MemoryBefore:
    """This machine's memory at the moment when a load begins."""

    def __init__(self) -> None:
        self.free_bytes = free_bytes()
        self.num_kills = num_oom_kills()

    def killed(self, settings: Settings, phase: Phase) -> LoaderKilled:
        """The error for a load that was killed in this phase."""
        is_certain = num_oom_kills() > self.num_kills
        why = " for want of memory" if is_certain else ", as happens where memory is short"
        free = f"{in_gb(self.free_bytes)} of main memory were free"
        return LoaderKilled(
            f"{KILLED} in phase {phase}{why}: it takes "
            f"{_needed(settings)}, and {free} when it began; take a machine with more memory.",
            retry=not is_certain,
        )


def _needed(settings: Settings) -> str:
    on_cpu = is_on_cpu(settings)
    beside = "" if on_cpu else f"about {in_gb(LOADER_BYTES)} of main memory, and on the GPU "
    try:
        weights, kv_cache = _sizes(settings, find_local(settings), on_cpu)
    except (ModelLoadFailed, ConfigError) as error:
        log.debug("the need is unknown: %s", error)
        return f"{beside}its weights" if beside else "its weights and its KV cache"
    cache = f" and {in_gb(kv_cache)} for its KV cache" if kv_cache is not None else ""
    return f"{beside}{in_gb(weights)} for its weights{cache}"


def _sizes(settings: Settings, folder: Path | None, on_cpu: bool) -> tuple[int, int | None]:
    """Bytes of weights and KV cache; None is what the GPU's memory leaves."""
    from serve_app.model.checkpoint.checkpoint import inspect

    if folder is None:
        raise ModelLoadFailed("The model is not on this machine.")
    checkpoint = inspect(folder)
    context = max_model_len(settings, checkpoint.config.max_position_embeddings)
    quantization = checkpoint.resolve_quantization(wished_quantization(settings))
    need = compute_need(settings, checkpoint.config, quantization, context, on_cpu)
    kv_cache = None if need.kv_tokens is None else need.kv_bytes(need.kv_tokens)
    return need.weight_bytes, kv_cache
