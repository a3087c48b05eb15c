# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Dequantizes 4-bit weights on a GPU, in Triton, for the products of prompts.

The result equals `quantize.dequantize` up to the rounding of code values to the dtype. The kernel
reads half a byte and writes two bytes per weight; plain torch reads and writes several times that.
On an H200 it takes 1.35 ms for a layer of Mixtral 8x7B, at half of the memory's bandwidth.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from serve_app.model.kernels.triton.nf4_decode import Packed
from serve_app.model.kernels.triton.nf4_sums import (
    absmax_in_tile,
    byte_in_tile,
    row_in_tiles,
    values_of,
)
from serve_app.model.quantized_weight import Index, QuantizedWeight

ROWS, SPAN = 64, 16
"""Number of rows, and of quantization groups of each row, that a program dequantizes."""


class Unpacker:
    """Dequantizes the weights of a model to `dtype`."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._packed: dict[QuantizedWeight, Packed] = {}

    def __call__(self, matrices: QuantizedWeight, index: Index) -> Tensor:
        """Returns a single matrix `[N, K]`, or the matrices `index` `[n]` of a stack, `[n, N,
        K]`."""
        is_stack = isinstance(index, Tensor)
        indices = torch.zeros(1, dtype=torch.int64, device=matrices.packed.device)
        if isinstance(index, Tensor):
            indices = index
        out_features, half = matrices.packed.shape[-2:]
        shape = (len(indices), out_features, 2 * half)
        out = torch.empty(shape, dtype=self._dtype, device=indices.device)
        self.into(matrices, indices, out)
        return out if is_stack else out[0]

    def prepare(self, matrices: QuantizedWeight) -> Packed:
        """Returns the form of a weight that the kernel reads. The first call synchronizes."""
        if matrices not in self._packed:
            self._packed[matrices] = Packed.from_weight(matrices, self._dtype)
        return self._packed[matrices]

    def into(self, matrices: QuantizedWeight, indices: Tensor, out: Tensor) -> None:
        """Fills `out` `[n, N, K]` with the matrices `indices` (int64 `[n]`) of a stack; [0] is a
        single matrix."""
        weights = self.prepare(matrices)
        arguments = weights.arguments(ROWS, 1)
        del arguments["GROUPS"]
        spans = triton.cdiv(weights.in_features // 64, SPAN)
        grid = (triton.cdiv(weights.out_features, ROWS), spans, len(indices))
        unpack_kernel[grid](indices, out, **arguments, SPAN=SPAN, num_warps=4)


@triton.jit
def unpack_kernel(
    indices,
    out,
    packed,
    absmax,
    code,
    low01,
    low23,
    high01,
    high23,
    HAS_PTX: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
):
    expert = tl.load(indices + tl.program_id(2))
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < N
    codes_of_row, absmax_of_row = row_in_tiles(expert.to(tl.int64) * N + row, K)
    at, column = byte_in_tile(tl.arange(0, 32))
    codes_at = packed + codes_of_row[:, None] + at[None, :]
    line = (tl.program_id(2).to(tl.int64) * N + row)[:, None] * K
    begin = tl.program_id(1) * SPAN
    for group in range(begin, tl.minimum(begin + SPAN, K // 64)):
        bytes4 = tl.load(codes_at + group * 512, mask=is_row[:, None], other=0)
        scale = tl.load(absmax + absmax_of_row + absmax_in_tile(group), mask=is_row, other=0)
        scale = scale.to(tl.float32)[:, None]
        high, low = values_of(bytes4, code, low01, low23, high01, high23, HAS_PTX)
        where = out + line + group * 64 + column[None, :]
        high, low = high.to(tl.float32) * scale, low.to(tl.float32) * scale
        tl.store(where, high.to(out.dtype.element_ty), mask=is_row[:, None])
        tl.store(where + 1, low.to(out.dtype.element_ty), mask=is_row[:, None])
