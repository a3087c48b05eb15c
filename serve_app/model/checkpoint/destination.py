"""Destination: the folder that a conversion writes, in the fused form or bitsandbytes' form.

A file with its final name is complete. Each file contains a fingerprint of the source, so that a
conversion continues only its own files. The index is written last, and without it the folder is not
a checkpoint.
"""

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from serve_app.errors import ModelLoadFailed
from serve_app.model.checkpoint.checkpoint import Checkpoint
from serve_app.model.checkpoint.find import SMALL_FILES
from serve_app.model.checkpoint.form import (
    FUSED_VERSION,
    fused_quantization_config,
    stored_form,
)
from serve_app.model.checkpoint.fused import SOURCE, file_names, fused_bytes
from serve_app.model.checkpoint.shards import INDEX, ITEM_BYTES, SINGLE, read_header, read_json
from serve_app.model.quantization import Quantization

LOCK = ".convert.lock"


class Destination:
    """The folder for the conversion of `checkpoint` with `quantization`."""

    def __init__(self, folder: Path, checkpoint: Checkpoint, quantization: Quantization) -> None:
        self.folder = folder
        self.checkpoint = checkpoint
        self.quantization = quantization
        self.files = file_names(checkpoint.config.num_hidden_layers)
        """The names of all files with weights: one for each layer, and one for the rest."""
        self.fingerprint = _fingerprint(checkpoint, quantization)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder's lock, and deletes partial files at the end.

        Raises `ModelLoadFailed` if another process holds the lock.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / LOCK).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ModelLoadFailed(
                    f"{self.folder}: another process is converting into this folder; wait for it.",
                    retry=True,
                ) from None
            try:
                yield
            finally:
                for partial in self.folder.glob(".*.partial"):
                    partial.unlink()

    def begin(self) -> list[str]:
        """Returns the names of the missing files. If any are missing, deletes the index: it would
        make a checkpoint of old and new files.

        Raises `ModelLoadFailed` if the folder holds another checkpoint, or if the files do not fit
        onto the disk.
        """
        self._require_no_other()
        missing = [name for name in self.files if not self._is_done(self.folder / name)]
        self._require_disk(len(missing) / len(self.files))
        if missing:
            (self.folder / INDEX).unlink(missing_ok=True)
        return missing

    def finish(self) -> None:
        """Writes the small files, and at the end the index, which makes the folder a checkpoint."""
        from serve_app.model.checkpoint.fused_writer import write_bytes
        from serve_app.model.checkpoint.to_bitsandbytes import bitsandbytes_config

        for pattern in SMALL_FILES:
            for file in self.checkpoint.path.glob(pattern):
                if file.name not in ("config.json", INDEX):
                    write_bytes(self.folder / file.name, file.read_bytes())
        is_back = self.checkpoint.form == "fused"
        make_config = bitsandbytes_config if is_back else fused_quantization_config
        config = {
            **self.checkpoint.document,
            "quantization_config": make_config(self.quantization),
        }
        write_bytes(self.folder / "config.json", json.dumps(config, indent=2).encode())
        weight_map = {
            tensor: name
            for name in self.files
            for tensor in read_header(self.folder / name).tensors
        }
        index = {"metadata": {}, "weight_map": weight_map}
        write_bytes(self.folder / INDEX, json.dumps(index, indent=2).encode())

    def _require_no_other(self) -> None:
        config = self.folder / "config.json"
        is_other = config.exists() and (
            self.checkpoint.form == "fused" or stored_form(read_json(config)) != "fused"
        )
        if is_other or (self.folder / SINGLE).exists():
            raise ModelLoadFailed(
                f"{self.folder}: the folder holds another checkpoint; name an empty folder."
            )

    def _is_done(self, file: Path) -> bool:
        """Returns True if an earlier run has written the file from the same source with the same
        options."""
        if not file.exists():
            return False
        try:
            return read_header(file).metadata.get(SOURCE) == self.fingerprint
        except ModelLoadFailed:
            return False

    def _require_disk(self, share: float) -> None:
        """Raises `ModelLoadFailed` unless `share` of the checkpoint fits onto the disk."""
        needed = int(converted_bytes(self.checkpoint, self.quantization) * share)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise ModelLoadFailed(
                f"{self.folder}: the converted checkpoint needs {needed / 1e9:.1f} GB more, but "
                f"only {free / 1e9:.1f} GB are free; free some space or choose another disk."
            )


def converted_bytes(checkpoint: Checkpoint, quantization: Quantization) -> int:
    """Returns the bytes of the converted checkpoint without its headers."""
    if checkpoint.form == "fused":  # approximately: absmax becomes float32
        return checkpoint.file_bytes
    stored = {tensor.dtype for tensor in checkpoint.tensors.values()}
    float_bytes = max((ITEM_BYTES[dtype] for dtype in stored), default=2)
    return fused_bytes(checkpoint.config, quantization, float_bytes)


def _fingerprint(checkpoint: Checkpoint, quantization: Quantization) -> str:
    """Returns a digest of the source files' names, sizes and times, the model's sizes and the
    quantization."""
    inputs: list[Any] = [FUSED_VERSION, fused_quantization_config(quantization), checkpoint.config]
    for file in sorted(checkpoint.headers):
        stat = file.stat()
        inputs.append((file.name, stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(repr(inputs).encode()).hexdigest()
