"""The models that `mixtral-serve quality` compares: the served one, and two in transformers.

Each is loaded, scores the text, and is freed before the next one is loaded.
"""

import gc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve_app.cli import progress
from serve_app.cli.quality_scores import LogProbs
from serve_app.cli.quality_text import Windows
from serve_app.loading.load import Loaded
from serve_app.model.footprint import num_quantized, parameters
from serve_app.model.quantization import Quantization

if TYPE_CHECKING:
    import torch

    from serve_app.model.config import MixtralConfig

SERVED = "mixtral-serve"
FLOATS = "transformers, floats"
BITSANDBYTES = "transformers with bitsandbytes"

MaxMemory = Mapping[int | str, int]
"""Maximum bytes that accelerate may use, by GPU index and for "cpu"."""


@dataclass(frozen=True, slots=True)
class Side:
    """One model and its distributions over the text."""

    name: str
    quantized: str
    """A phrase that names the 4-bit weights, or the reason why the model was not measured."""
    share_in_4_bits: float | None = None
    """Share of the model's parameters with 4 bits."""
    log_probs: LogProbs | None = None


def served(loaded: Loaded, quantizes_lm_head: bool, windows: Windows, path: Path) -> Side:
    """Scores the text with the engine's own steps, and stops the engine.

    `path` is the file of the distributions.
    """
    from serve_app.engine.model_runner import ModelRunner
    from serve_app.engine.text_logits import text_logits

    loaded.engine.stop()
    runner = loaded.engine.runner
    assert isinstance(runner, ModelRunner)
    pieces = (piece for ids in windows.inputs for piece in text_logits(runner, ids))
    log_probs = _scored(SERVED, pieces, windows, path)
    config, quantization = runner.model.config, loaded.quantization
    count, words = 0, f"nothing; {loaded.dtype}"
    if quantization is not None:
        count = num_quantized(config, quantizes_lm_head, runner.model.float_modules)
        parts = "experts, attention, lm_head" if quantizes_lm_head else "experts, attention"
        words = f"{parts} in {quantization.quant_type}, absmax {quantization.absmax}"
        if runner.model.float_modules:
            words += f", save {len(runner.model.float_modules)} modules"
        words += f"; the rest {loaded.dtype}"
    return Side(SERVED, words, count / _total(config), log_probs)


def floats(
    folder: Path, dtype: str, windows: Windows, path: Path, max_memory: MaxMemory | None = None
) -> Side:
    """Scores the text with the float checkpoint in `folder` in transformers.

    accelerate puts weights that do not fit on the GPU into memory, and the rest into files beside
    `path`. `max_memory` limits the memory that it uses, by default the free memory.
    """
    model = _transformers(folder, dtype, path.parent / "offload", max_memory=max_memory)
    where = "" if _is_whole(model) else ", offloaded"
    log_probs = _scored(FLOATS, _pieces(model, windows), windows, path)
    return Side(FLOATS, f"nothing; {dtype}{where}", 0.0, log_probs)


def bitsandbytes(
    folder: Path,
    dtype: str,
    quantization: Quantization | None,
    windows: Windows,
    path: Path,
) -> Side:
    """Scores the text with the checkpoint in `folder`, quantized by transformers with bitsandbytes.

    Uses the served model's 4-bit type; nf4 if the served model has floats.
    """
    import torch
    from bitsandbytes.nn import Linear4bit
    from transformers import BitsAndBytesConfig

    quant_type = "nf4" if quantization is None else quantization.quant_type
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
        # Without it, a model that does not fit on the GPU is refused. Layers elsewhere stay floats.
        llm_int8_enable_fp32_cpu_offload=torch.cuda.is_available(),
    )
    model = _transformers(folder, dtype, path.parent / "offload", quantization_config=config)
    linears = {
        name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)
    }
    count = sum(linear.in_features * linear.out_features for linear in linears.values())
    names = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linears))
    log_probs = _scored(BITSANDBYTES, _pieces(model, windows), windows, path)
    words = f"{names or 'nothing'} in {quant_type}; the rest {dtype}, the experts too"
    return Side(BITSANDBYTES, words, count / _total_of(folder), log_probs)


def free_memory() -> None:
    """Frees the memory of deleted models for the next one."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _scored(name: str, pieces: "Iterator[torch.Tensor]", windows: Windows, path: Path) -> LogProbs:
    """Stores the distributions of `pieces` of logits in `path`, and shows the progress."""
    num_tokens = len(windows.targets)
    log_probs: LogProbs | None = None
    with progress.items(name, "tokens") as show:
        for piece in pieces:
            log_probs = log_probs or LogProbs(path, num_tokens, piece.shape[-1])
            show(log_probs.add(piece), num_tokens, "")
    assert log_probs is not None
    return log_probs


def _transformers(folder: Path, dtype: str, offload: Path, **arguments: Any) -> Any:
    """Returns transformers' model of the checkpoint in `folder`, placed by accelerate."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        device_map="auto",
        offload_folder=offload,
        local_files_only=True,
        **arguments,
    )
    return model.eval()


def _is_whole(model: Any) -> bool:
    """Returns whether all weights are on one device."""
    return len(set(getattr(model, "hf_device_map", {}).values())) < 2


def _pieces(model: Any, windows: Windows) -> "Iterator[torch.Tensor]":
    """Yields the logits `[tokens, vocab_size]` of each window."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for ids in windows.inputs:
        with torch.inference_mode():
            yield model(torch.tensor([ids], device=device), use_cache=False).logits[0]


def _total(config: "MixtralConfig") -> int:
    return sum(parameters(config).values())


def _total_of(folder: Path) -> int:
    from serve_app.model.checkpoint.checkpoint import inspect

    return _total(inspect(folder).config)
