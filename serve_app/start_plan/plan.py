"""Makes the `StartPlan`: the checkpoint, its form, the device, the dtype and the memory.

    settings --plan_start--> StartPlan --> check, forecast, crash guard, trial, load

The process that starts Ray makes the plan and passes it to the replica with the deployment. A
replica without a plan, as with `serve run`, makes its own. A plan can be pickled.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from serve_app.config.settings import Settings
from serve_app.machine.volume import volume_folder
from serve_app.model.checkpoint import find
from serve_app.model.checkpoint.checkpoint import Checkpoint, inspect
from serve_app.model.quantization import Quantization
from serve_app.start_plan import device as devices
from serve_app.start_plan.device import Device, Dtype
from serve_app.start_plan.hub import Repository, download_cache, look_up
from serve_app.start_plan.memory import MemoryPlan, plan_memory
from serve_app.start_plan.model_copy import copy_folder, copy_problem
from serve_app.tiny import CHECKPOINT


@dataclass(frozen=True)
class StartPlan:
    """All decisions of a start before it loads."""

    checkpoint: Checkpoint
    """The checkpoint to load. If it must be downloaded, only the part that config.json
    describes."""
    repository: Repository | None
    """The repository to download first; None if the files are on this machine."""
    copy_folder: Path | None
    """The folder to which the load writes a 4-bit copy for later starts; None if it writes none."""
    quantization: Quantization | None
    """The storage of the large matrices on the device; None for floats."""
    quantize_lm_head: bool
    asked_device: Literal["auto", "cuda", "cpu"]
    """`model.device`, for error messages."""
    device: Device
    dtype: Dtype
    memory: MemoryPlan
    notes: tuple[str, ...]
    """Notes for users: the choices that the settings left open, and their reasons."""

    @property
    def files(self) -> list[Path]:
        """The weight files on this machine, in the order in which the loader reads them."""
        return list(self.checkpoint.headers)

    @property
    def quantizes(self) -> bool:
        """Whether the load quantizes float weights to 4 bits."""
        return self.checkpoint.form == "float" and self.quantization is not None


def plan_start(settings: Settings) -> StartPlan:
    """Returns the plan for `settings`. Reads config.json and the headers of the weight files.

    If the checkpoint is not on this machine, asks the hub and downloads config.json. Raises
    `ModelLoadFailed` or `ConfigError` with one sentence if the start cannot work.
    """
    copy = copy_folder(settings.model)
    if (folder := find_folder(settings, copy)) is not None:
        return plan_folder(settings, folder, copy)
    chosen = settings.model
    cache = download_cache(volume_folder(settings.runpod.volume))
    repository = look_up(chosen.name, chosen.revision, hf_token(settings), cache)
    checkpoint = Checkpoint.from_config(Path(chosen.name), repository.config)
    return _decide(settings, checkpoint, repository, copy)


def plan_folder(settings: Settings, folder: Path, copy: Path | None) -> StartPlan:
    """Returns the plan for the checkpoint in `folder`, such as a downloaded or converted one.

    `copy` is the folder for a 4-bit copy, or None.
    """
    return _decide(settings, inspect(folder), None, copy)


def find_folder(settings: Settings, copy: Path | None) -> Path | None:
    """Returns the folder to load from: the complete `copy`, otherwise that of `model.name`.

    None if the checkpoint must be downloaded. Raises `ModelLoadFailed` for an impossible name.
    """
    if copy is not None and find.is_complete(copy):
        return copy
    chosen = settings.model
    if chosen.name == "tiny":
        return CHECKPOINT
    volume = volume_folder(settings.runpod.volume)
    return find.find_local(chosen.name, chosen.revision, volume=volume)


def hf_token(settings: Settings) -> str | None:
    """Returns the token for gated repositories."""
    token = settings.model.hf_token
    return token.get_secret_value() if token else None


def _decide(
    settings: Settings, checkpoint: Checkpoint, repository: Repository | None, copy: Path | None
) -> StartPlan:
    model = settings.model
    requested = None
    if model.quantization != "none":
        requested = Quantization(model.quantization, model.absmax)
    quantization = checkpoint.resolve_quantization(requested, model.quantize_lm_head)
    device = devices.choose_device(model)
    dtype = devices.choose_dtype(model, device)
    memory = plan_memory(
        settings.engine,
        checkpoint.config,
        quantization,
        model.quantize_lm_head,
        device,
        dtype,
        checkpoint.float_modules,
    )
    notes = [*devices.notes(model, device, dtype), *checkpoint.notes()]
    if quantization is not None:
        notes.append(_quantization_note(settings, checkpoint, quantization))
    if checkpoint.form == "fused":
        copy = None
    if copy is not None and (problem := copy_problem(copy, settings.runpod.volume)) is not None:
        notes.append(f"no 4-bit copy is kept: `model.cache_dir`: {problem}")
        copy = None
    return StartPlan(
        checkpoint=checkpoint,
        repository=repository,
        copy_folder=copy,
        quantization=quantization,
        quantize_lm_head=model.quantize_lm_head,
        asked_device=model.device,
        device=device,
        dtype=dtype,
        memory=memory,
        notes=tuple(notes),
    )


def _quantization_note(
    settings: Settings, checkpoint: Checkpoint, quantization: Quantization
) -> str:
    head = settings.model.quantize_lm_head
    parts = "experts, attention and head" if head else "experts and attention"
    note = f"{parts} in {quantization.quant_type}, absmax {quantization.absmax}"
    stored = checkpoint.quantization
    if stored is not None and stored != quantization:
        note += f" (in the checkpoint: {stored.absmax})"
    return note
