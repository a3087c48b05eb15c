"""The load: tokenizer, weights and engine, phase by phase.

`MixtralServer`'s constructor calls `load` and nobody else does. Knows no requests.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from serve_app.config.settings import Settings
from serve_app.errors import ModelLoadFailed
from serve_app.loading.device import choose_device, choose_dtype, free_on, memory_for, set_threads
from serve_app.loading.load_log import LoadLog
from serve_app.loading.model_cache import copy_folder, find_copy, make_copy
from serve_app.loading.phases import Phase
from serve_app.model.footprint import weight_bytes
from serve_app.protocol.tokenizer import Tokenizer
from serve_app.start_plan.kv_size import kv_blocks, max_model_len

if TYPE_CHECKING:
    import torch

    from serve_app.engine.engine import Engine
    from serve_app.model.mixtral import Mixtral
    from serve_app.model.quantization import Quantization

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Loaded:
    """Everything that a server needs, ready to run."""

    tokenizer: Tokenizer
    engine: "Engine"
    max_model_len: int
    vocab_size: int
    dtype: str
    quantization: "Quantization | None"
    """How the weights are stored: as a quantised checkpoint has them, else as the settings ask."""
    memory: dict[str, int]
    """Bytes of `experts`, `attention`, `head`, `other` and `kv_cache`."""
    notes: list[str]
    """What was chosen where the settings left it open, and why."""


def load(settings: Settings, load_log: LoadLog) -> Loaded:
    """Loads what `settings` name onto the device; raises `ModelLoadFailed` in one sentence."""
    from serve_app.loading import warm_up
    from serve_app.model.checkpoint import loader
    from serve_app.model.checkpoint.checkpoint import inspect

    notes: list[str] = []
    with load_log.phase(Phase.DEVICE):  # the first to import torch, which takes its time
        device = choose_device(settings, notes)
        dtype = choose_dtype(settings, device, notes)
        set_threads(settings, device, notes)
    with load_log.phase(Phase.RESOLVE):
        path = find_local(settings)
    if path is None:
        with load_log.phase(Phase.DOWNLOAD):
            path = _download(settings, partial(load_log.progress, Phase.DOWNLOAD))
    if (wanted := copy_folder(settings)) is not None and path != wanted:
        with load_log.phase(Phase.COPY):
            tell = partial(load_log.progress, Phase.COPY)
            path = make_copy(settings, path, notes, tell)
    # First: a broken one is found before minutes go into the weights. A thread beside them saves
    # nothing: importing transformers holds the interpreter, which their reader needs too.
    with load_log.phase(Phase.TOKENIZER):
        tokenizer = _tokenizer(path, notes)
    reading = reading_phase(settings, path)
    with load_log.phase(reading):
        checkpoint = inspect(path)
        head = settings.model.quantize_lm_head
        quantization = checkpoint.resolve_quantization(wished_quantization(settings), head)
        sizes = weight_bytes(checkpoint.config, dtype.itemsize, quantization, head)
        needed = sum(sizes.values())
        with memory_for("the weights", needed, device, "quantise them, or take a larger GPU"):
            model = loader.load(
                checkpoint,
                dtype=dtype,
                device=device,
                quantization=quantization,
                quantize_lm_head=head,
                progress=partial(load_log.progress, reading),
            )
        _note_quantization(settings, model, notes)
    with load_log.phase(Phase.WARM_UP):
        engine, kv_bytes = _engine(settings, model, device, dtype, notes)
        with _stopped_on_failure(engine):
            warm_up.fill_a_step(engine, model.config.vocab_size, free_on(device))
    with load_log.phase(Phase.FIRST_TOKEN), _stopped_on_failure(engine):
        warm_up.first_token(engine, tokenizer.encode("Hello"), free_on(device))
    load_log.ready()
    for note in notes:
        log.info("load: %s", note)
    return Loaded(
        tokenizer=tokenizer,
        engine=engine,
        max_model_len=max_model_len(settings, model.config.max_position_embeddings),
        vocab_size=model.config.vocab_size,
        dtype=str(dtype).removeprefix("torch."),
        quantization=None if model.codes is None else model.codes.quantization,
        memory={**loader.bytes_by_part(model), "kv_cache": kv_bytes},
        notes=notes,
    )


def wished_quantization(settings: Settings) -> "Quantization | None":
    """How `settings` ask for weights to be quantised; None where they ask for floats."""
    from serve_app.model.quantization import Quantization

    if settings.model.quantization == "none":
        return None
    return Quantization(settings.model.quantization, settings.model.absmax)


def _note_quantization(settings: Settings, model: "Mixtral", notes: list[str]) -> None:
    if model.codes is None:
        return
    how = model.codes.quantization
    note = f"experts and attention in {how.quant_type}, absmax {how.absmax}"
    if settings.model.quantize_lm_head:
        note = f"experts, attention and head in {how.quant_type}, absmax {how.absmax}"
    if how.absmax != settings.model.absmax:
        note += ", as the checkpoint has it"
    notes.append(note)


def find_local(settings: Settings) -> Path | None:
    """The folder of the model that `settings` name; None where it would be downloaded."""
    from serve_app.model.checkpoint.find import find_local
    from serve_app.tiny import CHECKPOINT

    if (copy := find_copy(settings)) is not None:
        return copy
    if settings.model.name == "tiny":
        return CHECKPOINT
    volume = Path(settings.runpod.volume)
    return find_local(settings.model.name, settings.model.revision, volume=volume)


def _download(settings: Settings, progress: Callable[[float, int], None]) -> Path:
    from serve_app.model.checkpoint.find import download_cache
    from serve_app.start_plan.hub import download

    chosen = settings.model
    token = chosen.hf_token.get_secret_value() if chosen.hf_token else None
    hub = download_cache(Path(settings.runpod.volume))
    return download(chosen.name, chosen.revision, token, hub, progress)


def reading_phase(settings: Settings, path: Path) -> Phase:
    """What reading the checkpoint in folder `path` is called: floats are quantised meanwhile."""
    from serve_app.model.checkpoint.form import stored_form
    from serve_app.model.checkpoint.shards import read_json

    is_float = stored_form(read_json(path / "config.json")) == "float"
    quantises = is_float and settings.model.quantization != "none"
    return Phase.READ_AND_QUANTIZE if quantises else Phase.READ


def _tokenizer(path: Path, notes: list[str]) -> Tokenizer:
    try:
        tokenizer = Tokenizer(path)
        # The first encoding and rendering compile things; no request should wait for that.
        tokenizer.encode("Hello")
        if tokenizer.has_chat_template:
            tokenizer.render([{"role": "user", "content": "Hello"}])
    except Exception as error:  # tokenizers raises nothing more special
        log.debug("the tokenizer did not load", exc_info=True)
        raise ModelLoadFailed(
            f"{path}: the tokenizer cannot be read ({type(error).__name__}); the folder needs "
            "tokenizer.json and tokenizer_config.json with the model's chat template."
        ) from error
    if not tokenizer.has_chat_template:
        notes.append("no chat template in the checkpoint: only /v1/completions answers")
    return tokenizer


def _engine(
    settings: Settings,
    model: "Mixtral",
    device: "torch.device",
    dtype: "torch.dtype",
    notes: list[str],
) -> tuple["Engine", int]:
    """The started engine, and the bytes of its KV cache."""
    from serve_app.engine.engine import Engine
    from serve_app.engine.engine_config import EngineConfig
    from serve_app.engine.model_runner import ModelRunner
    from serve_app.model.kv import KVCache

    chosen = settings.engine
    context = max_model_len(settings, model.config.max_position_embeddings)
    token_bytes = KVCache.bytes_per_token(model.config, dtype)
    num_blocks = kv_blocks(chosen, device, token_bytes, context, notes)
    num_tokens = num_blocks * chosen.block_size
    what, needed = f"a KV cache of {num_tokens} tokens", num_tokens * token_bytes
    with memory_for(what, needed, device, "lower `engine.kv_cache_tokens`"):
        sizes = (num_blocks, chosen.block_size)
        runner = ModelRunner(model, *sizes, dtype, device, max_num_seqs=chosen.max_num_seqs)
    notes.append(runner.note)
    log.info("%s", runner.note)
    engine = Engine(
        runner,
        EngineConfig(
            max_model_len=context,
            max_num_seqs=chosen.max_num_seqs,
            max_waiting=chosen.max_waiting,
            block_size=chosen.block_size,
            num_blocks=num_blocks,
            max_num_batched_tokens=chosen.max_num_batched_tokens,
            eos_token_ids=model.config.eos_token_ids,
            retry_after_s=settings.api.retry_after_s,
            enable_prefix_caching=chosen.enable_prefix_caching,
        ),
    )
    engine.start()
    return engine, num_tokens * token_bytes


@contextmanager
def _stopped_on_failure(engine: "Engine") -> Iterator[None]:
    try:
        yield
    except BaseException:
        engine.stop()
        raise
