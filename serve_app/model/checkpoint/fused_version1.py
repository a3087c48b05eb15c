"""Reads fused checkpoints of version 1, whose weights are stored row by row with the source's
absmax.

Codes are read straight into the weights and reordered there, one layer at a time. absmax is read
into a buffer first, and rounded to bfloat16.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from serve_app.model.checkpoint.checkpoint import Checkpoint
from serve_app.model.checkpoint.fused import (
    NESTED_ABSMAX,
    NESTED_CODE,
    NESTED_OFFSET,
    is_source_absmax,
)
from serve_app.model.checkpoint.fused_reader import read_files
from serve_app.model.checkpoint.shards import TensorInfo
from serve_app.model.checkpoint.source import DTYPES
from serve_app.model.checkpoint.tensor_names import module_weights
from serve_app.model.checkpoint.weight_mapping import module_weight
from serve_app.model.mixtral import Mixtral
from serve_app.model.quantization import num_nested_groups
from serve_app.model.quantize import NestedAbsmax, absmax_values
from serve_app.model.quantized_weight import QuantizedWeight

STAGED = ("absmax", NESTED_ABSMAX, NESTED_OFFSET)
"""The tensors of a nested absmax, except the code values that all weights share."""


def read_version_1(
    checkpoint: Checkpoint,
    model: Mixtral,
    targets: Mapping[str, Tensor],
    report: Callable[[int], None],
) -> None:
    """Fills `targets`, the tensors of `model` by their names in the files. See `read_files`."""
    weights = dict(_weights(model))
    device = model.embedding.device
    # The file with the code values of nested absmax comes first, because all layers need them.
    files = sorted(checkpoint.headers.items(), key=lambda item: NESTED_CODE not in item[1].tensors)
    nested_code: Tensor | None = None
    for file, header in files:
        staged = {
            name: _empty(tensor, device)
            for name, tensor in header.tensors.items()
            if is_source_absmax(name) or (name.endswith(".absmax") and tensor.dtype == "U8")
        }
        read_files({file: header}, {**targets, **staged}, report)
        nested_code = staged.get(NESTED_CODE, nested_code)
        for name, weight in weights.items():
            if f"{name}.packed" in header.tensors:
                absmax_tensors = {
                    key: staged[f"{name}.{key}"] for key in STAGED if f"{name}.{key}" in staged
                }
                _finish(weight, absmax_tensors, nested_code)


def _weights(model: Mixtral) -> Iterator[tuple[str, QuantizedWeight]]:
    for entry in module_weights(model.config):
        weight = module_weight(model, entry.path)
        if entry.is_quantized and isinstance(weight, QuantizedWeight):
            yield entry.fused_name, weight


def _empty(tensor: TensorInfo, device: torch.device) -> Tensor:
    return torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype], device=device)


def _finish(weight: QuantizedWeight, staged: dict[str, Tensor], code: Tensor | None) -> None:
    """Fills absmax if it is nested, and reorders the weight if it is stored in tiles."""
    is_tiled, weight.is_tiled = weight.is_tiled, False
    if code is not None:
        _unnest(weight, staged, code)
    if is_tiled:
        weight.to_tiles()


def _unnest(weight: QuantizedWeight, staged: dict[str, Tensor], code: Tensor) -> None:
    """Fills the nested absmax of a weight stored row by row. Each part of a matrix is nested
    separately."""
    in_features, sizes = 2 * weight.packed.shape[-1], weight.out_features
    counts = [num_nested_groups(size * in_features) for size in sizes]
    filled = weight.absmax.view(-1, *weight.absmax.shape[-2:])
    numbers, scales, offsets = (staged[key] for key in STAGED)
    for i, (target, matrix) in enumerate(zip(filled, numbers.view(filled.shape), strict=True)):
        groups = torch.split(scales.view(len(filled), -1)[i], counts)
        offset = offsets.view(len(filled), -1)[i]
        rows_of_parts = zip(weight.rows_of_parts(target), weight.rows_of_parts(matrix), strict=True)
        for part, (rows, absmax_8bit) in enumerate(rows_of_parts):
            nested = NestedAbsmax(groups[part], code, offset[part])
            values = absmax_values(absmax_8bit.reshape(sizes[part], -1), nested)
            rows.copy_(values.view(rows.shape))
