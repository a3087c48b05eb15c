"""Lists the safetensors files of a checkpoint and reads their headers.

This takes milliseconds and finds every file that is missing, truncated or not a safetensors file.
`safetensors.safe_open` (0.8) is not used, because it maps the whole file and does not return the
offset of a tensor, which reading without a memory map needs. Imports no torch.
"""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from serve_app.errors import ModelLoadFailed
from serve_app.model.checkpoint.other_formats import describe_files

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
"""dtypes of floats, by safetensors' names."""
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "U8": 1, "I8": 1}
"""Bytes per element of the dtypes that a float or 4-bit checkpoint can have."""
FLOAT_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""safetensors' names of torch's floats."""
MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors format."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file, as described by the header."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    """Offset of its first byte from the beginning of the file."""
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """The header of one safetensors file."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_begin: int
    """Offset of the first byte after the header."""


def shard_files(path: Path) -> list[Path]:
    """Returns the safetensors files of a checkpoint in the index's order.

    As in transformers, an index is ignored if there is a model.safetensors, because some tools
    merge shards and leave the old index. Raises `ModelLoadFailed` if a file is missing.
    """
    single, index = path / SINGLE, path / INDEX
    if single.exists():
        return [single]
    if not index.exists():
        raise no_weights(path, f"{SINGLE} or {INDEX}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadFailed(f"{index}: `weight_map` is missing.")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelLoadFailed(
                f"{index}: `weight_map` names {name!r}, which is not a file in this folder."
            )
    files = []
    for name in dict.fromkeys(weight_map.values()):
        if not (path / name).exists():
            raise ModelLoadFailed(
                f"{path / name}: the file is missing, though `weight_map` in {index.name} names "
                "it; download the checkpoint again."
            )
        files.append(path / name)
    return files


def read_header(file: Path) -> Header:
    """Returns the header of one safetensors file.

    The format is an 8-byte little-endian length, that many bytes of JSON, then the data
    (https://huggingface.co/docs/safetensors). Raises `ModelLoadFailed` if the file is incomplete.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise damaged(file, "its header is cut off")
            header = json.loads(stream.read(length))
        metadata = dict(header.pop("__metadata__", None) or {})
        end = 0  # the data has no gaps, and tensors do not overlap
        for begin, next_end in sorted(entry["data_offsets"] for entry in header.values()):
            if begin != end:
                raise damaged(
                    file, f"its tensors have a gap or overlap at offset {min(begin, end)}"
                )
            end = next_end
        if (expected_size := 8 + length + end) != size:
            raise damaged(file, f"it has {size} bytes, but its header requires {expected_size}")
        tensors = {name: _tensor(file, 8 + length, name, entry) for name, entry in header.items()}
        return Header(tensors, metadata, 8 + length)
    except OSError as error:
        raise ModelLoadFailed(f"{file}: cannot be read ({error.strerror}).") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise damaged(file, "its header is not a safetensors header") from None


def read_bytes(tensor: TensorInfo) -> bytes:
    """Returns the data of one small tensor."""
    try:
        with tensor.file.open("rb") as stream:
            stream.seek(tensor.begin)
            return stream.read(tensor.nbytes)
    except OSError as error:
        raise ModelLoadFailed(f"{tensor.file}: cannot be read ({error.strerror}).") from None


def read_into(file: Path, begin: int, buffer: memoryview) -> None:
    """Fills `buffer` with the bytes of `file` from offset `begin` on."""
    try:
        with file.open("rb", buffering=0) as stream:
            stream.seek(begin)
            while buffer:
                if not (count := stream.readinto(buffer)):
                    raise damaged(file, "it was truncated while it was read")
                buffer = buffer[count:]
    except OSError as error:
        raise ModelLoadFailed(f"{file}: cannot be read ({error.strerror}).") from None


def damaged(file: Path, reason: str) -> ModelLoadFailed:
    """Returns the error for a damaged file, which advises another download."""
    return ModelLoadFailed(
        f"{file}: the file is damaged or incomplete ({reason}); download it again."
    )


def read_json(file: Path) -> dict[str, Any]:
    """Returns the object in a JSON file. Raises `ModelLoadFailed` if it cannot be read."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelLoadFailed(f"{file}: the file is missing.") from None
    except OSError as error:
        raise ModelLoadFailed(f"{file}: cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError):
        raise ModelLoadFailed(f"{file}: the file is not valid JSON.") from None
    if not isinstance(document, dict):
        raise ModelLoadFailed(f"{file}: the file must contain a JSON object.")
    return document


def _tensor(file: Path, data_begin: int, name: str, entry: dict[str, Any]) -> TensorInfo:
    dtype, shape = str(entry["dtype"]), tuple(int(size) for size in entry["shape"])
    begin, end = entry["data_offsets"]
    if begin < 0 or (dtype in ITEM_BYTES and end - begin != prod(shape) * ITEM_BYTES[dtype]):
        raise damaged(file, f"the offsets of tensor `{name}` are wrong")
    return TensorInfo(name, file, dtype, shape, data_begin + begin, end - begin)


def no_weights(path: Path, missing: str) -> ModelLoadFailed:
    """Returns the error for a folder without `missing`, with a description of the folder if it is
    known."""
    if (description := describe_files([file.name for file in path.iterdir()])) is not None:
        return ModelLoadFailed(f"{path}: {missing} is missing; the folder has {description}.")
    return ModelLoadFailed(f"{path}: {missing} is missing; name the folder of a checkpoint.")
