"""Loads a model phase by phase: device, checkpoint, tokenizer, weights, engine.

The constructor of `MixtralServer` calls `load`, which follows a `StartPlan`. It makes a new plan
only if files have changed: after a download, and after the 4-bit copy is written.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from serve_app.config.settings import ConfigError, Settings
from serve_app.errors import ModelLoadFailed
from serve_app.loading.device import (
    explained_lack_of_memory,
    free_device_bytes,
    open_device,
    set_allocator,
    set_threads,
)
from serve_app.loading.generation import read_generation
from serve_app.loading.load_log import LoadLog
from serve_app.loading.phases import Phase
from serve_app.loading.start_engine import start_engine
from serve_app.model.checkpoint.convert import convert_checkpoint
from serve_app.protocol.tokenizer import Tokenizer
from serve_app.start_plan.hub import download
from serve_app.start_plan.plan import StartPlan, hf_token, plan_folder, plan_start

if TYPE_CHECKING:
    import torch

    from serve_app.engine.engine import Engine
    from serve_app.model.mixtral import Mixtral
    from serve_app.model.quantization import Quantization

log = logging.getLogger(__name__)

KERNELS_FOLDER = "~/.cache/mixtral-serve"
"""Folder of the compiled kernels if `model.cache_dir` is not set. The build of the image fills
it."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """The loaded model and everything else that a server needs."""

    tokenizer: Tokenizer
    engine: "Engine"
    max_model_len: int
    vocab_size: int
    dtype: str
    quantization: "Quantization | None"
    """The storage of the weights on the device; None for floats."""
    memory: dict[str, int]
    """Bytes of `experts`, `attention`, `head`, `other` and `kv_cache`."""
    notes: list[str]
    """Notes for users: the choices that the settings left open, and their reasons."""
    sampling_defaults: Mapping[str, float] = field(default_factory=dict)
    """The checkpoint's defaults of sampling fields, by name."""


def load(settings: Settings, load_log: LoadLog, plan: StartPlan | None = None) -> Loaded:
    """Loads the model of `plan`, or of a new plan for `settings`.

    Raises `ModelLoadFailed` with one sentence.
    """
    set_allocator()
    with load_log.phase(Phase.DEVICE):  # the first import of torch takes seconds
        from serve_app.model.checkpoint import loader
    with load_log.phase(Phase.RESOLVE):
        plan = _current_plan(settings, plan)
        device, notes = open_device(plan), list(plan.notes)
        if device.type == "cpu":
            notes += set_threads(settings.engine.num_threads)
    plan = _fetch_files(settings, plan, load_log, notes)
    # The tokenizer is loaded before the weights, so that an invalid one fails at once. Loading it
    # in a thread saves no time, because both hold Python's lock.
    with load_log.phase(Phase.TOKENIZER):
        tokenizer = load_tokenizer(settings, plan)
        generation = read_generation(plan.checkpoint, tokenizer, settings.model.generation_config)
        notes += [*tokenizer.notes, *generation.notes]
    model = _load_model(plan, device, load_log)
    notes += _choose_kernels(settings, model, device, load_log)
    start = partial(start_engine, settings, plan, model, device, generation.eos_token_ids)
    engine, engine_notes = _warm_engine(start, tokenizer, model, device, load_log)
    notes += engine_notes
    load_log.ready()
    for note in notes:
        log.info("load: %s", note)
    kv_tokens = engine.config.num_blocks * engine.config.block_size
    return Loaded(
        tokenizer=tokenizer,
        engine=engine,
        max_model_len=plan.memory.max_model_len,
        vocab_size=model.config.vocab_size,
        dtype=plan.dtype,
        quantization=plan.quantization,
        memory={**loader.bytes_by_part(model), "kv_cache": plan.memory.kv_bytes(kv_tokens)},
        notes=notes,
        sampling_defaults=generation.defaults,
    )


def _current_plan(settings: Settings, plan: StartPlan | None) -> StartPlan:
    """Returns `plan`, or a new plan if `plan` is None or would download files.

    A new plan finds files that an earlier try has downloaded since `plan` was made.
    """
    if plan is not None and plan.repository is None:
        return plan
    try:
        return plan_start(settings)
    except ConfigError as error:
        raise ModelLoadFailed(str(error)) from None


def _fetch_files(
    settings: Settings, plan: StartPlan, load_log: LoadLog, notes: list[str]
) -> StartPlan:
    """Downloads the checkpoint and writes the 4-bit copy if `plan` requires it.

    Returns the plan for the files to load, and adds its notes to `notes`.
    """
    if plan.repository is not None:
        with load_log.phase(Phase.DOWNLOAD):
            progress = partial(load_log.progress, Phase.DOWNLOAD)
            folder = download(plan.repository, hf_token(settings), progress)
            plan = plan_folder(settings, folder, plan.copy_folder)
    if plan.copy_folder is not None:
        with load_log.phase(Phase.COPY):
            copied = partial(load_log.progress, Phase.COPY)
            plan, note = _write_copy(settings, plan, plan.copy_folder, copied)
            notes.append(note)
    notes += [note for note in plan.notes if note not in notes]
    return plan


def _write_copy(
    settings: Settings, plan: StartPlan, copy: Path, progress: Callable[[float], None]
) -> tuple[StartPlan, str]:
    """Writes the 4-bit copy into folder `copy`. Returns the plan to load it, and a note for users.

    Returns `plan` unchanged if the copy cannot be written or another process is writing it, because
    a start does not need the copy.
    """
    quantization = None  # 4-bit weights keep their absmax
    if plan.quantization is not None and plan.quantizes:
        quantization = replace(plan.quantization, absmax=settings.model.absmax)
    try:
        convert_checkpoint(
            plan.checkpoint,
            copy,
            quantization,
            lambda done, total, name: progress(done / total),
        )
    except ModelLoadFailed as error:
        return plan, f"this start reads the original checkpoint; there is no 4-bit copy: {error}"
    return plan_folder(settings, copy, None), f"{copy}: the 4-bit copy for later starts"


def load_tokenizer(settings: Settings, plan: StartPlan) -> Tokenizer:
    """Returns the checkpoint's tokenizer after a first encoding and rendering.

    The first use compiles patterns and templates, which would slow down the first request. Raises
    `ModelLoadFailed`.
    """
    folder, vocab_size = plan.checkpoint.path, plan.checkpoint.config.vocab_size
    tokenizer = Tokenizer(
        folder,
        sanitize_control_tokens=settings.api.sanitize_control_tokens,
        custom_chat_template=settings.model.custom_chat_template,
    )
    ids = tokenizer.encode("Hello")
    if tokenizer.has_chat_template:
        ids += tokenizer.render([{"role": "user", "content": "Hello"}])
    if (token := tokenizer.first_unknown(ids, vocab_size)) is not None:
        raise ModelLoadFailed(
            f"{folder}: a prompt contains `{token}`, a token that the tokenizer has but the model "
            f"does not: its vocabulary has {vocab_size} tokens. Use the tokenizer that belongs to "
            "these weights."
        )
    return tokenizer


def _load_model(plan: StartPlan, device: "torch.device", load_log: LoadLog) -> "Mixtral":
    import torch

    from serve_app.model.checkpoint import loader

    dtype: torch.dtype = getattr(torch, plan.dtype)
    reading = Phase.READ_AND_QUANTIZE if plan.quantizes else Phase.READ
    remedy = "quantize them, or take a larger GPU"
    with (
        load_log.phase(reading),
        explained_lack_of_memory("the weights", plan.memory.weight_bytes, device, remedy),
    ):
        return loader.load(
            plan.checkpoint,
            dtype=dtype,
            device=device,
            quantization=plan.quantization,
            quantize_lm_head=plan.quantize_lm_head,
            progress=partial(load_log.progress, reading),
        )


def _choose_kernels(
    settings: Settings, model: "Mixtral", device: "torch.device", load_log: LoadLog
) -> list[str]:
    """Prepares the CUDA kernels for 4-bit weights on a GPU. Returns notes for users."""
    if device.type != "cuda" or model.codebook is None:
        return []
    from serve_app.model.kernels.cuda.use_kernels import use_cuda_kernels

    folders = [settings.model.cache_dir or KERNELS_FOLDER, KERNELS_FOLDER]
    cache, filled = (Path(folder).expanduser() / "kernels" for folder in folders)
    needed = model.config.intermediate_size * model.config.hidden_size  # gate and up of an expert
    with (
        load_log.phase(Phase.KERNELS),
        explained_lack_of_memory("the trial of kernels", needed, device, "take a larger GPU"),
    ):
        return [use_cuda_kernels(model, cache, [filled])]


def _warm_engine(
    start: "Callable[[], tuple[Engine, list[str]]]",
    tokenizer: Tokenizer,
    model: "Mixtral",
    device: "torch.device",
    load_log: LoadLog,
) -> "tuple[Engine, list[str]]":
    """Returns the running engine after its first prompts, and notes for users."""
    from serve_app.loading import warm_up

    with load_log.phase(Phase.WARM_UP):
        engine, notes = start()
        with _stopped_on_failure(engine):
            warm_up.run_prompts(engine, model.config.vocab_size, free_device_bytes(device))
    with load_log.phase(Phase.FIRST_TOKEN), _stopped_on_failure(engine):
        warm_up.first_token(engine, tokenizer.encode("Hello"), free_device_bytes(device))
    return engine, notes


@contextmanager
def _stopped_on_failure(engine: "Engine") -> Iterator[None]:
    try:
        yield
    except BaseException:
        engine.stop()
        raise
