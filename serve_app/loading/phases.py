"""The phases of a load and their events, one JSON object per line in a load log.

    {"phase": "read", "state": "started", "at": seconds since the epoch}
    {"phase": "read", "state": "running", "done": 0.43, "bytes": total size, if known}
    {"phase": "read", "state": "done", "seconds": 41.2}
    {"phase": "read", "state": "failed", "error": "One sentence.", "retry": false}

The last event of a load is `{"phase": "ready", "state": "done", "seconds": sum of all phases}`.
"""

from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal, TypedDict

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter


class Phase(StrEnum):
    """The phases of a start, in this order. Users see the values."""

    PROCESS = "process"
    """The process that starts Ray starts."""
    RAY = "ray"
    REPLICA = "replica"
    """Serve starts the replica's process and imports its code."""
    DEVICE = "device"
    """torch is imported."""
    RESOLVE = "resolve"
    """The checkpoint is found and the start is planned."""
    DOWNLOAD = "download"
    COPY = "copy"
    """The 4-bit copy is written to `model.cache_dir`."""
    TOKENIZER = "tokenizer"
    READ = "read"
    READ_AND_QUANTIZE = "read and quantize"
    KERNELS = "kernels"
    """The CUDA kernels are compiled, or read from the cache, and compared with plain torch."""
    WARM_UP = "warm-up"
    FIRST_TOKEN = "first token"
    READY = "ready"

    @property
    def reads_weights(self) -> bool:
        """Whether the load reads the weight files in this phase."""
        return self in (Phase.READ, Phase.READ_AND_QUANTIZE)


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True)

    phase: Phase


class Started(_Event):
    state: Literal["started"] = "started"
    at: float
    """Seconds since the epoch."""


class Running(_Event):
    state: Literal["running"] = "running"
    done: float
    """From 0 to 1."""
    bytes: int | None = None
    """The total size if progress is counted in bytes."""


class Done(_Event):
    state: Literal["done"] = "done"
    seconds: float


class Failed(_Event):
    state: Literal["failed"] = "failed"
    error: str
    """One sentence for users."""
    retry: bool


Event = Started | Running | Done | Failed

_EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="state")])


class PhaseTime(TypedDict):
    """A finished phase, in the form of `/health` and progress updates."""

    phase: str
    seconds: float


def finished(events: Iterable[Event]) -> list[PhaseTime]:
    """Returns the finished phases, in order."""
    done = (event for event in events if isinstance(event, Done))
    return [{"phase": event.phase.value, "seconds": event.seconds} for event in done]


def read_events(path: str | Path) -> list[Event]:
    """Returns the events in a load log; empty if there is no file.

    A line without its newline is still being written and is left for the next call.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [_EVENT.validate_json(line) for line in lines if line.endswith("\n")]
