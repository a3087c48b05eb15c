"""Writes a fused checkpoint (`fused.py`): one file per layer, one for the rest.

A file gets its name when it is complete and on the disk, never before.
"""

import json
import os
import zlib
from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from serve_app.model.checkpoint.fused import CHECKSUMS, PIECE_BYTES, SOURCE
from serve_app.model.checkpoint.source import DTYPES, Source
from serve_app.model.checkpoint.tensor_names import CODEBOOK, ModuleWeight, module_weights
from serve_app.model.quantized_weight import Codebook, QuantizedWeight

ALIGNMENT = 4096
"""Data begins at a multiple of this, so that it can be read without the page cache."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def file_tensors(source: Source, layer: int | None, codebook: Codebook) -> dict[str, Tensor]:
    """The tensors of one layer's file; with `layer` None those that belong to no layer.

    Weights in 4 bits are on the device of `codebook`.
    """
    entries = module_weights(source.checkpoint.config)
    tensors: dict[str, Tensor] = {}
    for entry in entries:
        if entry.layer != layer:
            continue
        if entry.is_quantized:
            tensors |= _quantized(source, entry, codebook)
        else:
            tensors[entry.fused_name] = source.floats(entry.weights[0])
    if layer is None:
        _fill(codebook, source, entries)
        tensors |= {f"{CODEBOOK}.{name}": table for name, table in codebook.named_buffers()}
    return tensors


def _quantized(source: Source, entry: ModuleWeight, codebook: Codebook) -> dict[str, Tensor]:
    assert entry.in_features is not None
    with codebook.code.device:
        weight = QuantizedWeight(
            codebook,
            entry.experts,
            entry.in_features,
            entry.out_features,
            interleaved=entry.row.is_interleaved,
        )
    for part in entry.weights:
        weight.load_weight(source.read(part), part.expert, part.index)
    buffers = weight.named_buffers(recurse=False)
    return {f"{entry.fused_name}.{name}": buffer for name, buffer in buffers}


def _fill(codebook: Codebook, source: Source, entries: tuple[ModuleWeight, ...]) -> None:
    """Fills `codebook`, as any matrix does: all layers may have been written by an earlier run."""
    matrices = [weight for entry in entries if entry.is_quantized for weight in entry.weights]
    smallest = min(matrices, key=lambda weight: prod(weight.shape))
    with codebook.code.device:
        out_features, in_features = smallest.shape
        scratch = QuantizedWeight(codebook, (), in_features, (out_features,))
    scratch.load_weight(source.read(smallest))


def write_file(file: Path, tensors: dict[str, Tensor], source: str) -> None:
    """Writes `file`, whose metadata says that it was made from `source`.

    Raises `OSError`; what was there under that name before is then still there.
    """
    ordered = sorted(tensors.items(), key=lambda item: -item[1].nbytes)
    header, begin = {}, 0
    for name, tensor in ordered:
        offsets = [begin, begin + tensor.nbytes]
        shape = list(tensor.shape)
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": shape, "data_offsets": offsets}
        begin += tensor.nbytes
    sums = " ".join(f"{crc:08x}" for crc in _checksums([tensor for _, tensor in ordered]))
    text = json.dumps({"__metadata__": {CHECKSUMS: sums, SOURCE: source}, **header}).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    partial = file.with_name(f".{file.name}.partial")
    with partial.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            stream.write(_bytes(tensor))
        stream.flush()
        os.fsync(stream.fileno())
    put_in_place(partial, file)


def write_bytes(file: Path, data: bytes) -> None:
    """Writes a small file in the same way as `write_file`."""
    partial = file.with_name(f".{file.name}.partial")
    with partial.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    put_in_place(partial, file)


def put_in_place(partial: Path, file: Path) -> None:
    """Gives a file that is on the disk its name, on the disk too."""
    partial.replace(file)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.cpu().contiguous().flatten().view(torch.uint8)
    return flat.numpy().data


def _checksums(tensors: list[Tensor]) -> Iterator[int]:
    """CRC-32 of each `PIECE_BYTES` of the tensors, end to end."""
    crc, filled = 0, 0
    for tensor in tensors:
        data = _bytes(tensor)
        while data:
            part, data = data[: PIECE_BYTES - filled], data[PIECE_BYTES - filled :]
            crc, filled = zlib.crc32(part, crc), filled + len(part)
            if filled == PIECE_BYTES:
                yield crc
                crc, filled = 0, 0
    if filled:
        yield crc
