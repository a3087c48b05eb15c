"""Explains the death of a process that loaded a model, which is usually a lack of memory."""

from serve_app.cold_start.load_records import KILLED
from serve_app.errors import LoaderKilled
from serve_app.loading.phases import Phase
from serve_app.machine.host import free_bytes, num_oom_kills
from serve_app.start_plan.memory import in_gb
from serve_app.start_plan.plan import StartPlan

LOADER_BYTES = 4_000_000_000
"""Main memory that a load onto a GPU needs, in bytes: CUDA, torch, and buffers for weights."""


class MemoryBefore:
    """The state of this machine's memory when a load begins."""

    def __init__(self) -> None:
        self.free_bytes = free_bytes()
        self.num_kills = num_oom_kills()

    def killed(self, plan: StartPlan | None, phase: Phase) -> LoaderKilled:
        """Returns the error for a load that was killed in `phase`. With a `plan`, the error names
        the sizes."""
        is_certain = num_oom_kills() > self.num_kills
        cause = " because memory ran out" if is_certain else ", usually for lack of memory"
        free = f"{in_gb(self.free_bytes)} of main memory were free"
        return LoaderKilled(
            f"{KILLED} in phase {phase}{cause}: it takes "
            f"{_needed(plan)}, and {free} when it began; use a machine with more memory.",
            retry=not is_certain,
        )


def _needed(plan: StartPlan | None) -> str:
    if plan is None:
        return "its weights and its KV cache"
    memory = plan.memory
    needed = f"{in_gb(memory.weight_bytes)} for its weights"
    if memory.kv_cache_tokens is not None:
        needed += f" and {in_gb(memory.kv_bytes(memory.kv_cache_tokens))} for its KV cache"
    if plan.device == "cpu":
        return needed
    return f"about {in_gb(LOADER_BYTES)} of main memory, and on the GPU {needed}"
