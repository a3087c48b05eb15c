"""Converts a checkpoint to the fused form, or a fused one back to bitsandbytes' form, layer by
layer.

bitsandbytes' 4-bit weights keep their bits; float weights are quantized. A stopped conversion
continues when it is started again: a file with its final name is complete. The index is written
last, and without it the folder is not a checkpoint. At most one layer is in memory.
"""

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve_app.errors import ModelLoadFailed
from serve_app.model.checkpoint.checkpoint import Checkpoint, inspect
from serve_app.model.checkpoint.form import (
    FUSED_VERSION,
    fused_quantization_config,
    fused_version,
    stored_form,
)
from serve_app.model.checkpoint.fused import (
    SOURCE,
    file_names,
    fused_bytes,
    require_whole_groups,
)
from serve_app.model.checkpoint.shards import INDEX, ITEM_BYTES, SINGLE, read_header, read_json
from serve_app.model.quantization import Quantization

if TYPE_CHECKING:  # that module imports torch
    from serve_app.model.checkpoint.source import Source

COPIED = ("tokenizer*", "*.jinja", "*.json")
LOCK = ".convert.lock"

Progress = Callable[[int, int, str], None]
"""Called with the number of finished files, the number of all files, and the name of the last
file."""


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
    files = file_names(checkpoint.config.num_hidden_layers)
    try:
        destination.mkdir(parents=True, exist_ok=True)
        with _locked(destination):
            _require_room(destination, checkpoint)
            made_from = _fingerprint(checkpoint, quantization)
            missing = [name for name in files if not _is_done(destination / name, made_from)]
            require_disk(destination, checkpoint, quantization, len(missing) / len(files))
            if missing:  # an index of older files would make a checkpoint of a mixture
                (destination / INDEX).unlink(missing_ok=True)
            report(len(files) - len(missing), len(files), "")
            given = (checkpoint, source, quantization)
            _write_files(*given, destination, missing, made_from, report)
            _finish(checkpoint, quantization, destination)
    except OSError as error:
        raise ModelLoadFailed(
            f"{error.filename or destination}: cannot be written ({error.strerror})."
        ) from None


def converted_bytes(checkpoint: Checkpoint, quantization: Quantization) -> int:
    """Returns the bytes of the converted checkpoint without its headers."""
    if checkpoint.form == "fused":  # nearly: float32 absmax takes the place of others
        return checkpoint.file_bytes
    stored = {tensor.dtype for tensor in checkpoint.tensors.values()}
    float_bytes = max((ITEM_BYTES[dtype] for dtype in stored), default=2)
    return fused_bytes(checkpoint.config, quantization, float_bytes)


def require_disk(
    destination: Path, checkpoint: Checkpoint, quantization: Quantization, share: float
) -> None:
    """Raises `ModelLoadFailed` unless `share` of the converted checkpoint fits onto the disk."""
    needed = int(converted_bytes(checkpoint, quantization) * share)
    free = shutil.disk_usage(destination).free
    if needed > free:
        raise ModelLoadFailed(
            f"{destination}: the converted checkpoint needs {needed / 1e9:.1f} GB more, but only "
            f"{free / 1e9:.1f} GB are free; free some space or choose another disk."
        )


def _choose(checkpoint: Checkpoint, asked: Quantization | None) -> Quantization:
    if checkpoint.quantization is None:
        require_whole_groups(checkpoint.config)
        return asked or Quantization("nf4", "bfloat16")
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
    if asked not in (None, stored):
        raise ModelLoadFailed(
            f"{checkpoint.path}: the weights are already {stored.quant_type} with {stored.absmax} "
            "absmax and cannot be changed; leave out --quantization and --absmax."
        )
    return stored


def _write_files(
    checkpoint: Checkpoint,
    source: "Source | None",
    quantization: Quantization,
    destination: Path,
    missing: list[str],
    made_from: str,
    report: Progress,
) -> None:
    import torch

    files = file_names(checkpoint.config.num_hidden_layers)
    write = _writer(checkpoint, quantization, source)
    for name in missing:
        write(files.index(name), destination / name, made_from)
        done = len(files) - len(missing) + missing.index(name) + 1
        report(done, len(files), name)
    if torch.cuda.is_available():  # leaves the memory to a load that follows
        torch.cuda.empty_cache()


def _writer(
    checkpoint: Checkpoint, quantization: Quantization, source: "Source | None"
) -> Callable[[int, Path, str], None]:
    """Returns a function that writes file number i to a path, with the fingerprint of its
    source."""
    import torch

    from serve_app.model.checkpoint.fused_writer import file_tensors, write_file
    from serve_app.model.checkpoint.source import Source
    from serve_app.model.checkpoint.to_bitsandbytes import BackToBitsandbytes
    from serve_app.model.quantized_weight import Codebook

    if checkpoint.form == "fused":
        back = BackToBitsandbytes(checkpoint)
        headers = sorted(checkpoint.headers.items())
        return lambda i, file, made_from: back.write(*headers[i], file, made_from)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = source or Source(checkpoint)
    codebook = Codebook(quantization.quant_type).to(device)

    def write(number: int, file: Path, made_from: str) -> None:
        layer = number if number < checkpoint.config.num_hidden_layers else None
        write_file(file, file_tensors(weights, layer, codebook, quantization.absmax), made_from)

    return write


def _finish(checkpoint: Checkpoint, quantization: Quantization, destination: Path) -> None:
    """Writes the small files, and at the end the index, which makes the folder a checkpoint."""
    from serve_app.model.checkpoint.fused_writer import write_bytes
    from serve_app.model.checkpoint.to_bitsandbytes import bitsandbytes_config

    for pattern in COPIED:
        for file in checkpoint.path.glob(pattern):
            if file.name not in ("config.json", INDEX):
                write_bytes(destination / file.name, file.read_bytes())
    is_back = checkpoint.form == "fused"
    make_config = bitsandbytes_config if is_back else fused_quantization_config
    config = {**checkpoint.document, "quantization_config": make_config(quantization)}
    write_bytes(destination / "config.json", json.dumps(config, indent=2).encode())
    weight_map = {
        tensor: name
        for name in file_names(checkpoint.config.num_hidden_layers)
        for tensor in read_header(destination / name).tensors
    }
    index = {"metadata": {}, "weight_map": weight_map}
    write_bytes(destination / INDEX, json.dumps(index, indent=2).encode())


def _require_room(destination: Path, checkpoint: Checkpoint) -> None:
    """Raises `ModelLoadFailed` if the folder holds another checkpoint."""
    config = destination / "config.json"
    is_other = config.exists() and (
        checkpoint.form == "fused" or stored_form(read_json(config)) != "fused"
    )
    if is_other or (destination / SINGLE).exists():
        raise ModelLoadFailed(
            f"{destination}: the folder holds another checkpoint; name an empty folder."
        )


def _is_done(file: Path, made_from: str) -> bool:
    """Returns True if an earlier run has written the file from the same source with the same
    options."""
    if not file.exists():
        return False
    try:
        return read_header(file).metadata.get(SOURCE) == made_from
    except ModelLoadFailed:
        return False


def _fingerprint(checkpoint: Checkpoint, quantization: Quantization) -> str:
    """Returns a digest of the source files' names, sizes and times, the model's sizes and the
    quantization.

    Every file contains it, so that a conversion continues only its own files.
    """
    seen: list[Any] = [FUSED_VERSION, fused_quantization_config(quantization), checkpoint.config]
    for file in sorted(checkpoint.headers):
        stat = file.stat()
        seen.append((file.name, stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(repr(seen).encode()).hexdigest()


@contextmanager
def _locked(destination: Path) -> Iterator[None]:
    """Holds the folder's lock, and deletes partial files at the end.

    Raises `ModelLoadFailed` if another process holds the lock.
    """
    with (destination / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ModelLoadFailed(
                f"{destination}: another process is converting into this folder; wait for it.",
                retry=True,
            ) from None
        try:
            yield
        finally:
            for partial in destination.glob(".*.partial"):
                partial.unlink()
