"""The fused form: Mixtral with 4-bit weights in few large tensors, which a load reads without
copies.

`fused_writer` writes the form and `fused_reader` reads it. It has one safetensors file per layer
and one for the rest. The bytes are those of `QuantizedWeight` in memory: codes and bfloat16 absmax,
in tiles if the sizes are multiples of a tile's. If the source's absmax is not bfloat16, the files
also contain the source's absmax, so that `to_bitsandbytes` can restore it; a load does not read it.

`quantization_config` in config.json contains the form, its version and the quantization
(`form.py`). The metadata of each file contains the version and the CRC-32 of every piece of
`PIECE_BYTES` of its data. Version 1 has codes and the source's absmax row by row, with gate and up
interleaved (`fused_version1`). This module reads no weights and imports no torch.
"""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import NamedTuple

from serve_app.errors import ModelLoadFailed
from serve_app.model.checkpoint.form import FUSED_VERSION
from serve_app.model.checkpoint.shards import ITEM_BYTES, Header, TensorInfo, damaged
from serve_app.model.checkpoint.tensor_names import CODEBOOK, ModuleWeight, module_weights
from serve_app.model.config import MixtralConfig
from serve_app.model.quantization import (
    ABSMAX_DTYPES,
    GROUP_SIZE,
    NUM_CODES,
    NUM_NESTED_CODES,
    Quantization,
    num_nested_groups,
)

PIECE_BYTES = 16 << 20
"""Number of bytes that one checksum covers and one read fetches."""
CHECKSUMS = "crc32"
"""Key of a file's metadata: the checksums of its pieces, 8 hexadecimal digits each."""
VERSION = "version"
"""Key of a file's metadata: the version of the form; version 1 did not write it."""
SOURCE = "source"
"""Key of a file's metadata: the fingerprint of its source, see `convert.py`."""
SOURCE_ABSMAX, NESTED_ABSMAX, NESTED_OFFSET = "source_absmax", "nested_absmax", "nested_offset"
"""Tensors of a weight: the source's absmax if it is not bfloat16, and the two tables of a nested
absmax."""
NESTED_CODE = f"{CODEBOOK}.nested_code"
FUSED_FLOATS = ("F32", "BF16", "F16")
"""dtypes of the weights that are not quantized in a fused checkpoint."""


class Expected(NamedTuple):
    """The dtypes and the shape that a tensor of a fused checkpoint must have."""

    dtypes: tuple[str, ...]
    shape: tuple[int, ...]


def require_whole_groups(config: MixtralConfig) -> None:
    """Raises `ModelLoadFailed` if a weight's in_features is not a multiple of `GROUP_SIZE`."""
    sizes = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads x head_dim": config.q_size,
    }
    for key, size in sizes.items():
        if size % GROUP_SIZE:
            raise ModelLoadFailed(
                f"config.json: `{key}` ({size}) must be a multiple of {GROUP_SIZE} to be quantized."
            )


def is_source_absmax(name: str) -> bool:
    """Returns whether a tensor is used only by `to_bitsandbytes`, and not by the model."""
    return name == NESTED_CODE or name.endswith((SOURCE_ABSMAX, NESTED_ABSMAX, NESTED_OFFSET))


def fused_tensors(
    config: MixtralConfig, quantization: Quantization, version: int = FUSED_VERSION
) -> dict[str, Expected]:
    """Returns every tensor of a fused checkpoint by its name."""
    tensors: dict[str, Expected] = {}
    for weight in module_weights(config):
        if weight.is_quantized:
            tensors |= _quantized_tensors(weight, quantization, version)
        else:
            tensors[weight.fused_name] = Expected(FUSED_FLOATS, weight.shape)
    tensors[f"{CODEBOOK}.code"] = Expected(("F32",), (NUM_CODES,))
    if quantization.absmax == "nested":
        tensors[NESTED_CODE] = Expected(("F32",), (NUM_NESTED_CODES,))
    return tensors


def _quantized_tensors(
    weight: ModuleWeight, quantization: Quantization, version: int
) -> dict[str, Expected]:
    """Returns the buffers of a `QuantizedWeight`, and the source's absmax."""
    assert weight.in_features is not None
    name, in_features, parts = weight.fused_name, weight.in_features, weight.out_features
    whole, kind = (*weight.experts, sum(parts)), quantization.absmax
    groups = (*whole, in_features // GROUP_SIZE)
    source = Expected((ABSMAX_DTYPES[kind],), groups)
    tensors = {f"{name}.packed": Expected(("U8",), (*whole, in_features // 2))}
    if version == 1:
        tensors[f"{name}.absmax"] = source
    else:
        tensors[f"{name}.absmax"] = Expected(("BF16",), groups)
        if kind != "bfloat16":
            tensors[f"{name}.{SOURCE_ABSMAX}"] = source
    if kind == "nested":
        nested = sum(num_nested_groups(size * in_features) for size in parts)
        tensors[f"{name}.{NESTED_ABSMAX}"] = Expected(("F32",), (*weight.experts, nested))
        tensors[f"{name}.{NESTED_OFFSET}"] = Expected(("F32",), (*weight.experts, len(parts)))
    return tensors


def file_names(num_layers: int) -> list[str]:
    """Returns the files of a checkpoint: one for each layer, one for the rest."""
    total = num_layers + 1
    return [f"model-{i:05}-of-{total:05}.safetensors" for i in range(1, total + 1)]


def fused_bytes(config: MixtralConfig, quantization: Quantization, float_bytes: int) -> int:
    """Returns the bytes of a fused checkpoint without headers; a float weight has `float_bytes`."""
    return sum(
        prod(shape) * (float_bytes if dtypes == FUSED_FLOATS else ITEM_BYTES[dtypes[0]])
        for dtypes, shape in fused_tensors(config, quantization).values()
    )


def match_fused(
    path: Path,
    config: MixtralConfig,
    quantization: Quantization,
    version: int,
    headers: Mapping[Path, Header],
    tensors: dict[str, TensorInfo],
) -> None:
    """Raises `ModelLoadFailed` unless `tensors` is exactly what a fused checkpoint has."""
    expected = fused_tensors(config, quantization, version)
    for name, (dtypes, shape) in expected.items():
        if name not in tensors:
            raise ModelLoadFailed(
                f"{path}: no file has the tensor `{name}`, which the model needs."
            )
        tensor = tensors[name]
        if tensor.shape != shape or tensor.dtype not in dtypes:
            raise ModelLoadFailed(
                f"{tensor.file}: tensor `{name}` is {tensor.dtype} {list(tensor.shape)}, but "
                f"config.json requires {' or '.join(dtypes)} {list(shape)}."
            )
    for name, tensor in tensors.items():
        if name not in expected:
            raise ModelLoadFailed(f"{tensor.file}: tensor `{name}` is not part of a Mixtral model.")
    for file, header in headers.items():
        checksums(file, header)
        if (written := header.metadata.get(VERSION, "1")) != str(version):
            raise ModelLoadFailed(
                f"{file}: has version {written} of our format, but config.json has version "
                f"{version}; convert the checkpoint again with `mixtral-serve convert`."
            )


def checksums(file: Path, header: Header) -> list[int]:
    """Returns the CRC-32 of each piece of a file's data. Raises `ModelLoadFailed` if one is
    missing."""
    try:
        numbers = [int(digits, 16) for digits in header.metadata[CHECKSUMS].split()]
    except (KeyError, ValueError, AttributeError):
        raise damaged(file, "its checksums are missing") from None
    end = max((tensor.begin + tensor.nbytes for tensor in header.tensors.values()), default=0)
    if len(numbers) != -(-(end - header.data_begin) // PIECE_BYTES):
        raise damaged(file, "its checksums are incomplete")
    return numbers
