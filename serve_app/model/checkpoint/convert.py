"""Converts a checkpoint to the fused form, or a fused checkpoint back to bitsandbytes' form, layer
by layer.

bitsandbytes' 4-bit weights keep their bits; float weights are quantized. A stopped conversion
continues when it is started again (`destination.py`). At most one layer is in memory.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from serve_app.errors import ModelLoadFailed
from serve_app.model.checkpoint.checkpoint import Checkpoint, inspect
from serve_app.model.checkpoint.destination import Destination
from serve_app.model.checkpoint.form import FUSED_VERSION, fused_version
from serve_app.model.checkpoint.fused import require_whole_groups
from serve_app.model.quantization import Quantization

if TYPE_CHECKING:  # that module imports torch
    from serve_app.model.checkpoint.source import Source

Progress = Callable[[int, int, str], None]
"""A function `progress(num_done, num_files, name)`; `name` is the last finished file."""


def convert(
    source: Path,
    destination: Path,
    quantization: Quantization | None = None,
    progress: Progress | None = None,
) -> None:
    """Converts the checkpoint in folder `source`. Raises the errors of `convert_checkpoint` and
    `inspect`."""
    convert_checkpoint(inspect(source), destination, quantization, progress)


def convert_checkpoint(
    checkpoint: Checkpoint,
    destination: Path,
    quantization: Quantization | None = None,
    progress: Progress | None = None,
    source: "Source | None" = None,
) -> None:
    """Writes `checkpoint` to folder `destination` in the fused form.

    A fused checkpoint is written in bitsandbytes' form instead, with the codes and the absmax of
    its original source. `quantization` applies to float weights; None means nf4 with bfloat16
    absmax. 4-bit weights are not quantized again. `source` reads the weights; None reads the
    checkpoint's files. Quantizes on a GPU if there is one.

    Raises `ModelLoadFailed` if a file cannot be read, or if `destination` cannot be written.
    """
    report = progress or (lambda done, total, name: None)
    quantization = _choose(checkpoint, quantization)
    try:
        to = Destination(destination, checkpoint, quantization)
        with to.locked():
            missing = to.begin()
            num_done = len(to.files) - len(missing)
            report(num_done, len(to.files), "")
            write = _writer(to, source)
            for name in missing:
                write(name)
                num_done += 1
                report(num_done, len(to.files), name)
            _free_gpu_memory()
            to.finish()
    except OSError as error:
        raise ModelLoadFailed(
            f"{error.filename or destination}: cannot be written ({error.strerror})."
        ) from None


def _choose(checkpoint: Checkpoint, requested: Quantization | None) -> Quantization:
    if checkpoint.quantization is None:
        require_whole_groups(checkpoint.config)
        return requested or Quantization("nf4", "bfloat16")
    if checkpoint.form == "fused" and fused_version(checkpoint.document) != FUSED_VERSION:
        raise ModelLoadFailed(
            f"{checkpoint.path}: version 1 of our own form cannot be converted; serve it as it is, "
            "or convert the checkpoint that it was made from."
        )
    if checkpoint.float_modules:
        raise ModelLoadFailed(
            f"{checkpoint.path}: some experts or attention weights are floats and others have 4 "
            "bits, which our own form does not support; serve it as it is, or convert the float "
            "checkpoint."
        )
    stored = checkpoint.quantization
    if requested not in (None, stored):
        raise ModelLoadFailed(
            f"{checkpoint.path}: the weights are already {stored.quant_type} with {stored.absmax} "
            "absmax and cannot be changed; leave out --quantization and --absmax."
        )
    return stored


def _writer(to: Destination, source: "Source | None") -> Callable[[str], None]:
    """Returns a function `write(name)` that writes one of the destination's files."""
    import torch

    from serve_app.model.checkpoint.fused_writer import file_tensors, write_file
    from serve_app.model.checkpoint.source import Source
    from serve_app.model.checkpoint.to_bitsandbytes import BackToBitsandbytes
    from serve_app.model.quantized_weight import Codebook

    checkpoint = to.checkpoint
    if checkpoint.form == "fused":
        back = BackToBitsandbytes(checkpoint)
        headers = dict(zip(to.files, sorted(checkpoint.headers.items()), strict=True))
        return lambda name: back.write(*headers[name], to.folder / name, to.fingerprint)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = source or Source(checkpoint)
    codebook = Codebook(to.quantization.quant_type).to(device)

    def write(name: str) -> None:
        number = to.files.index(name)
        layer = number if number < checkpoint.config.num_hidden_layers else None
        tensors = file_tensors(weights, layer, codebook, to.quantization.absmax)
        write_file(to.folder / name, tensors, to.fingerprint)

    return write


def _free_gpu_memory() -> None:
    """Frees torch's cached GPU memory for a load that follows."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
