"""Writes a fused checkpoint (`fused.py`): one file per layer, one for the rest.

A file gets its final name only after it is complete and on the disk.
"""

import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from serve_app.model.checkpoint.form import FUSED_VERSION
from serve_app.model.checkpoint.fused import (
    CHECKSUMS,
    NESTED_ABSMAX,
    NESTED_CODE,
    NESTED_OFFSET,
    PIECE_BYTES,
    SOURCE,
    SOURCE_ABSMAX,
    VERSION,
    is_source_absmax,
)
from serve_app.model.checkpoint.source import DTYPES, Source
from serve_app.model.checkpoint.tensor_names import CODEBOOK, ModuleWeight, module_weights
from serve_app.model.quantization import AbsmaxKind
from serve_app.model.quantize import QuantizedTensor, quantize
from serve_app.model.quantized_weight import Codebook, QuantizedWeight

ALIGNMENT = 4096
"""The data of a file begins at a multiple of this, so that it can be read without the page
cache."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def file_tensors(
    source: Source, layer: int | None, codebook: Codebook, source_absmax: AbsmaxKind
) -> dict[str, Tensor]:
    """Returns the tensors of one layer's file. `layer` None is the file for the rest.

    4-bit weights are on the device of `codebook`. If `source_absmax` is not bfloat16, the file also
    contains absmax in this form: the form of the source, or for float weights the requested one.
    """
    entries = module_weights(source.checkpoint.config)
    tensors: dict[str, Tensor] = {}
    for entry in entries:
        if entry.layer != layer:
            continue
        if entry.is_quantized:
            tensors |= _quantized(source, entry, codebook, source_absmax)
        else:
            tensors[entry.fused_name] = source.floats(entry.weights[0])
    if layer is None:
        matrix = _smallest(source, entries, codebook, source_absmax)
        tensors[f"{CODEBOOK}.code"] = matrix.code
        if matrix.nested is not None:
            tensors[NESTED_CODE] = matrix.nested.code
    return tensors


def empty_weight(entry: ModuleWeight, codebook: Codebook) -> QuantizedWeight:
    """Returns an unset weight of the shape of `entry`, on the device of `codebook`."""
    assert entry.in_features is not None
    with codebook.code.device:
        return QuantizedWeight(
            codebook,
            entry.experts,
            entry.in_features,
            entry.out_features,
            interleaved=entry.row.is_interleaved,
        )


def _quantized(
    source: Source, entry: ModuleWeight, codebook: Codebook, source_absmax: AbsmaxKind
) -> dict[str, Tensor]:
    weight = empty_weight(entry, codebook)
    matrices = []
    for part in entry.weights:
        matrix = _quantize(source.read(part), codebook, source_absmax)
        weight.load_weight(matrix, part.expert, part.index)
        matrices.append(replace(matrix, packed=matrix.packed[:0]))
    buffers = weight.named_buffers(recurse=False)
    tensors = dict(buffers) | ({} if source_absmax == "bfloat16" else _absmax_of(entry, matrices))
    return {f"{entry.fused_name}.{name}": tensor for name, tensor in tensors.items()}


def _quantize(
    values: Tensor | QuantizedTensor, codebook: Codebook, absmax: AbsmaxKind
) -> QuantizedTensor:
    """Returns `values` quantized; 4-bit values are returned unchanged."""
    if isinstance(values, QuantizedTensor):
        return values
    return quantize(values.to(codebook.code.device), codebook.quant_type, absmax)


def _absmax_of(entry: ModuleWeight, matrices: list[QuantizedTensor]) -> dict[str, Tensor]:
    """Returns the absmax of `matrices`: expert by expert, part by part, row by row."""
    nested = [matrix.nested for matrix in matrices if matrix.nested is not None]
    tensors = {SOURCE_ABSMAX: torch.cat([matrix.absmax for matrix in matrices])}
    if nested:
        tensors[NESTED_ABSMAX] = torch.cat([absmax.absmax for absmax in nested])
        tensors[NESTED_OFFSET] = torch.stack([absmax.offset for absmax in nested])
    shape = {SOURCE_ABSMAX: (sum(entry.out_features), tensors[SOURCE_ABSMAX].shape[-1])}
    return {
        name: tensor.view(*entry.experts, *shape.get(name, (-1,)))
        for name, tensor in tensors.items()
    }


def _smallest(
    source: Source, entries: tuple[ModuleWeight, ...], codebook: Codebook, source_absmax: AbsmaxKind
) -> QuantizedTensor:
    """Returns the smallest matrix, for its tables, which are needed even if all layers are
    done."""
    matrices = [weight for entry in entries if entry.is_quantized for weight in entry.weights]
    smallest = min(matrices, key=lambda weight: prod(weight.shape))
    return _quantize(source.read(smallest), codebook, source_absmax)


def write_file(file: Path, tensors: dict[str, Tensor], source: str) -> None:
    """Writes `file`, with the fingerprint `source` in its metadata.

    Tensors that a load does not read come last. Raises `OSError`; an existing file of that name is
    then unchanged.
    """
    ordered = dict(
        sorted(tensors.items(), key=lambda item: (is_source_absmax(item[0]), -item[1].nbytes))
    )
    sums = " ".join(f"{crc:08x}" for crc in _checksums(list(ordered.values())))
    metadata = {CHECKSUMS: sums, VERSION: str(FUSED_VERSION), SOURCE: source}
    write_tensors(file, ordered, metadata)


def write_tensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file with the tensors in the given order. Raises the errors of
    `write_file`."""
    header, begin = {}, 0
    for name, tensor in tensors.items():
        offsets = [begin, begin + tensor.nbytes]
        shape = list(tensor.shape)
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": shape, "data_offsets": offsets}
        begin += tensor.nbytes
    text = json.dumps({"__metadata__": metadata, **header}).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    partial = file.with_name(f".{file.name}.partial")
    with partial.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
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
    """Renames a complete file to its final name, and syncs the folder to the disk."""
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
    """Yields the CRC-32 of each `PIECE_BYTES` of the concatenated tensors."""
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
