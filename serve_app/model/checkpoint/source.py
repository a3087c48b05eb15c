"""Reads the weights of a float or bitsandbytes checkpoint one by one, by transformers 4's names.

Experts and attention keep their 4-bit weights. A 4-bit router or lm_head becomes floats, and 4-bit
weights become floats if other weights of the same `Weight.module` are floats. Files are read, not
mapped: the pages of a mapped file count as memory of this process, and one shard of Mixtral has
5 GB.
"""

import torch
from torch import Tensor

from serve_app.errors import ModelLoadFailed
from serve_app.model.checkpoint.bnb4 import PackedInfo
from serve_app.model.checkpoint.checkpoint import Checkpoint
from serve_app.model.checkpoint.other_formats import FLOATS_INSTEAD
from serve_app.model.checkpoint.shards import TensorInfo, read_into
from serve_app.model.checkpoint.tensor_names import Weight
from serve_app.model.quantize import NestedAbsmax, QuantizedTensor, dequantize

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U8": torch.uint8,
    "I8": torch.int8,
}
"""torch's dtypes by safetensors' names."""


class Source:
    """Reads the weights of a `Checkpoint` of form "float" or "bitsandbytes"."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._code: Tensor | None = None
        self._nested_code: Tensor | None = None
        self._float_modules = checkpoint.float_modules

    def read(self, weight: Weight) -> Tensor | QuantizedTensor:
        """Returns the weight on the CPU, in 4 bits if both the files and the model use 4 bits.

        Raises `ModelLoadFailed` if a file cannot be read, or if matrices are quantized with
        different code values: all weights of a model share one codebook.
        """
        packed = self.checkpoint.packed.get(weight.name)
        if packed is None or not weight.is_quantized:
            return self.floats(weight)
        values = self._quantized(packed)
        if weight.module in self._float_modules:
            return dequantize(values, torch.float32)
        self._code = _same_table(packed, packed.code, values.code, self._code)
        if packed.nested is not None and values.nested is not None:
            code = packed.nested.code
            self._nested_code = _same_table(packed, code, values.nested.code, self._nested_code)
        return values

    def floats(self, weight: Weight) -> Tensor:
        """Returns the weight on the CPU as floats; float64 becomes float32.

        A 4-bit weight, such as a router, is dequantized as in bitsandbytes.
        """
        if (packed := self.checkpoint.packed.get(weight.name)) is not None:
            return dequantize(self._quantized(packed), DTYPES[packed.float_dtype])
        if (tensor := self.checkpoint.tensors.get(weight.name)) is not None:
            values = self._read(tensor)
        else:
            merged = weight.merged
            values = self._read(self.checkpoint.tensors[merged.name], merged.index, merged.count)
            values = values.view(weight.shape)
        return values.float() if values.dtype == torch.float64 else values

    def _quantized(self, info: PackedInfo) -> QuantizedTensor:
        out_features, in_features = info.shape
        packed = self._read(info.packed).view(torch.uint8).view(out_features, in_features // 2)
        absmax = self._read(info.absmax).view(out_features, -1)
        code = self._read(info.code).flatten()
        if info.nested is None:
            return QuantizedTensor(packed, absmax, code)
        nested = NestedAbsmax(
            self._read(info.nested.absmax).flatten(),
            self._read(info.nested.code).flatten(),
            torch.tensor(info.nested.offset, dtype=torch.float32),
        )
        return QuantizedTensor(packed, absmax, code, nested)

    def _read(self, tensor: TensorInfo, index: int = 0, count: int = 1) -> Tensor:
        """Returns slice `index` of a tensor that is divided into `count` equal slices."""
        shape = tensor.shape
        if count > 1:  # [E, N, K] in E * 2 slices: [N / 2, K] each
            shape = (tensor.shape[0] * tensor.shape[1] // count, *tensor.shape[2:])
        values = torch.empty(shape, dtype=DTYPES[tensor.dtype])
        begin = tensor.begin + index * values.nbytes
        read_into(tensor.file, begin, values.view(-1).view(torch.uint8).numpy().data)
        return values


def _same_table(
    info: PackedInfo, table: TensorInfo, values: Tensor, first_table: Tensor | None
) -> Tensor:
    """Returns `values` of `table`. Raises `ModelLoadFailed` if they differ from `first_table`."""
    if first_table is None or torch.equal(values, first_table):
        return values
    raise ModelLoadFailed(
        f"{info.packed.file}: tensor `{table.name}` differs from that of other weights, but all "
        f"weights must be quantized with the same values; {FLOATS_INSTEAD}."
    )
