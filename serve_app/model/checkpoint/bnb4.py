"""4-bit weights as bitsandbytes stores them in a checkpoint, from the headers alone.

transformers 4.x wrote each quantized matrix as `<weight>` (packed nibbles, viewed as the dtype of
`bnb_4bit_quant_storage`) and its companions `<weight>.absmax`, `.quant_map`, `.nested_absmax`,
`.nested_quant_map` and `.quant_state.bitsandbytes__nf4` or `__fp4`, a JSON blob
(`bitsandbytes.functional.QuantState.as_dict(packed=True)`).

Only the blobs are read, not the weights. Imports no torch.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any, cast

from serve_app.errors import ModelLoadFailed
from serve_app.model.checkpoint.other_formats import FLOATS_INSTEAD
from serve_app.model.checkpoint.shards import (
    FLOAT_DTYPES,
    ITEM_BYTES,
    TensorInfo,
    damaged,
    read_bytes,
)
from serve_app.model.checkpoint.tensor_names import Weight
from serve_app.model.quantization import (
    GROUP_SIZE,
    NESTED_GROUP_SIZE,
    NUM_CODES,
    NUM_NESTED_CODES,
    AbsmaxKind,
    QuantType,
)

STATE = "quant_state.bitsandbytes__"
COMPANIONS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


@dataclass(frozen=True, slots=True)
class NestedInfo:
    """The tensors of a nested absmax."""

    absmax: TensorInfo
    """F32 `[ceil(N * K / 64 / 256)]`"""
    code: TensorInfo
    """F32 `[256]`"""
    offset: float


@dataclass(frozen=True, slots=True)
class PackedInfo:
    """The tensors of one quantized matrix `[N, K]`."""

    shape: tuple[int, int]
    quant_type: QuantType
    float_dtype: str
    """dtype of the matrix before it was quantized, by safetensors' names."""
    packed: TensorInfo
    """A tensor of N * K / 2 bytes and any dtype."""
    absmax: TensorInfo
    """F32 or BF16 `[N * K / 64]`; U8 if it is nested."""
    code: TensorInfo
    """F32 `[16]`"""
    nested: NestedInfo | None

    @property
    def absmax_kind(self) -> AbsmaxKind:
        """The storage of absmax."""
        if self.absmax.dtype == "U8":
            return "nested"
        return "bfloat16" if self.absmax.dtype == "BF16" else "float32"

    @property
    def tensors(self) -> list[TensorInfo]:
        """All tensors of the matrix."""
        nested = [] if self.nested is None else [self.nested.absmax, self.nested.code]
        return [self.packed, self.absmax, self.code, *nested]


def take_packed(tensors: dict[str, TensorInfo], weights: Iterable[Weight]) -> dict[str, PackedInfo]:
    """Removes quantized weights and their companions from `tensors`. Returns them by name.

    Raises `ModelLoadFailed` if a companion is missing or does not fit, or if matrices that stay in
    4 bits are quantized in different ways.
    """
    packed: dict[str, PackedInfo] = {}
    kinds: dict[tuple[QuantType, AbsmaxKind], str] = {}
    states = {name.partition(f".{STATE}")[0]: name for name in tensors if f".{STATE}" in name}
    for weight in weights:
        name = weight.name
        if name in tensors and (name in states or _looks_packed(name, tensors, weight.shape)):
            packed[name] = _take(weight, states.get(name), tensors)
        if weight.is_quantized and name in packed:
            kinds.setdefault((packed[name].quant_type, packed[name].absmax_kind), name)
    if len(kinds) > 1:
        (first, first_name), (second, second_name) = list(kinds.items())[:2]
        raise ModelLoadFailed(
            f"{packed[first_name].packed.file.parent}: `{first_name}` is {first[0]} with "
            f"{first[1]} absmax and `{second_name}` is {second[0]} with {second[1]} absmax, but "
            f"all weights must be quantized in the same way; {FLOATS_INSTEAD}."
        )
    return packed


def _looks_packed(name: str, tensors: dict[str, TensorInfo], shape: tuple[int, ...]) -> bool:
    """Returns True if a tensor without a blob looks quantized: by its companions, or by its
    shape."""
    stored_shape = tensors[name].shape
    return any(f"{name}.{companion}" in tensors for companion in COMPANIONS) or (
        stored_shape != shape and len(stored_shape) == 2 and 1 in stored_shape and len(shape) == 2
    )


def _take(matrix: Weight, state_name: str | None, tensors: dict[str, TensorInfo]) -> PackedInfo:
    name, shape = matrix.name, matrix.shape
    weight = tensors.pop(name)
    if len(shape) != 2 or shape[1] % GROUP_SIZE:
        raise ModelLoadFailed(
            f"{weight.file}: tensor `{name}` {list(shape)} is quantized, but only matrices whose "
            f"in_features are a multiple of {GROUP_SIZE} can be read in 4 bits; {FLOATS_INSTEAD}."
        )
    if state_name is None:
        raise _missing(weight, f"{name}.{STATE}nf4")
    info = tensors.pop(state_name)
    state = _state(info, state_name)
    quant_type = state_name.removeprefix(f"{name}.{STATE}")
    _require(state, state_name, info, "quant_type", quant_type)
    if quant_type not in ("nf4", "fp4"):
        raise ModelLoadFailed(
            f"{info.file}: `{state_name}`: only nf4 and fp4 can be read; {FLOATS_INSTEAD}."
        )
    _require(state, state_name, info, "blocksize", GROUP_SIZE)
    _require(state, state_name, info, "shape", list(shape))
    if weight.dtype not in ITEM_BYTES or weight.nbytes * 2 != prod(shape):
        raise ModelLoadFailed(
            f"{weight.file}: tensor `{name}` has {weight.nbytes} bytes, but a 4-bit matrix "
            f"{list(shape)} has {prod(shape) // 2}."
        )
    num_groups = prod(shape) // GROUP_SIZE
    nested = None
    dtypes: tuple[str, ...] = ("F32", "BF16")
    if "nested_offset" in state or f"{name}.nested_absmax" in tensors:
        dtypes = ("U8",)
        nested = _take_nested(name, weight, state_name, state, tensors, num_groups)
    return PackedInfo(
        shape=(shape[0], shape[1]),
        quant_type=cast("QuantType", quant_type),
        float_dtype=FLOAT_DTYPES.get(str(state.get("dtype")), "F32"),
        packed=weight,
        absmax=_companion(tensors, weight, f"{name}.absmax", num_groups, dtypes),
        code=_companion(tensors, weight, f"{name}.quant_map", NUM_CODES, ("F32",)),
        nested=nested,
    )


def _take_nested(
    name: str,
    weight: TensorInfo,
    state_name: str,
    state: dict[str, Any],
    tensors: dict[str, TensorInfo],
    num_groups: int,
) -> NestedInfo:
    _require(state, state_name, weight, "nested_blocksize", NESTED_GROUP_SIZE)
    offset = state.get("nested_offset")
    if not isinstance(offset, float | int) or not math.isfinite(offset):
        raise ModelLoadFailed(f"{weight.file}: `{state_name}`: `nested_offset` is {offset!r}.")
    count = -(-num_groups // NESTED_GROUP_SIZE)
    return NestedInfo(
        absmax=_companion(tensors, weight, f"{name}.nested_absmax", count, ("F32",)),
        code=_companion(tensors, weight, f"{name}.nested_quant_map", NUM_NESTED_CODES, ("F32",)),
        offset=float(offset),
    )


def _companion(
    tensors: dict[str, TensorInfo],
    weight: TensorInfo,
    name: str,
    count: int,
    dtypes: tuple[str, ...],
) -> TensorInfo:
    tensor = tensors.pop(name, None)
    if tensor is None:
        raise _missing(weight, name)
    if prod(tensor.shape) != count or tensor.dtype not in dtypes:
        raise ModelLoadFailed(
            f"{tensor.file}: tensor `{name}` is {tensor.dtype} {list(tensor.shape)}, but its "
            f"weight needs {count} values of {' or '.join(dtypes)}."
        )
    return tensor


def _state(info: TensorInfo, name: str) -> dict[str, Any]:
    try:
        state = json.loads(read_bytes(info))
    except (ValueError, RecursionError):
        state = None
    if info.dtype != "U8" or not isinstance(state, dict):
        raise damaged(info.file, f"tensor `{name}` holds no JSON object")
    return state


def _require(
    state: dict[str, Any], name: str, info: TensorInfo, key: str, expected: object
) -> None:
    if state.get(key) != expected:
        raise ModelLoadFailed(
            f"{info.file}: `{name}`: `{key}` is {state.get(key)!r}, but only {expected!r} can be "
            f"read; {FLOATS_INSTEAD}."
        )


def _missing(weight: TensorInfo, name: str) -> ModelLoadFailed:
    return ModelLoadFailed(
        f"{weight.file.parent}: no file has the tensor `{name}`, which is needed to read the "
        "quantized weight; download the checkpoint again."
    )
