"""Matrices in 4 bits as parts of a module: buffers in the form that kernels and our files have.

`nf4.py` says what the numbers mean; here is where they lie. Matrices that a checkpoint keeps apart
and quantised apart (q, k and v; gate and up) are one matrix here, because they are multiplied with
the same input. Knows no model and no files.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serve_app.model.nf4 import (
    Nested,
    Quantized,
    dequantize,
    plain_absmax,
    quantize,
    quantize_absmax,
)
from serve_app.model.quantization import GROUP_SIZE, NESTED_GROUP_SIZE, Quantization

GROUP = 8
"""Rows of one part in a row, where parts are interleaved: a kernel's tile has both of a pair."""


Index = tuple[int, ...] | Tensor


class _Stored(nn.Module):
    """A module whose buffers have the dtypes of a format."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # As bytes: `model.to(torch.bfloat16)` is meant for the model's floats, not for these.
        def move(stored: Tensor) -> Tensor:
            return fn(stored.view(torch.uint8)).view(stored.dtype)

        return super()._apply(move, recurse)  # type: ignore[no-untyped-call]


class Codes(_Stored):
    """What the numbers of all 4-bit matrices of a model mean; one object that all of them share."""

    code: Tensor
    """float32 `[16]`"""
    nested_code: Tensor
    """float32 `[256]`; only where absmax is nested."""

    def __init__(self, quantization: Quantization) -> None:
        super().__init__()
        self.quantization = quantization
        self.unpack: Callable[[Matrices4, Index], Tensor] | None = None
        """Makes floats of matrices where something does it faster than `dequantize`."""
        self.register_buffer("code", torch.empty(16, dtype=torch.float32))
        if quantization.absmax == "nested":
            self.register_buffer("nested_code", torch.empty(256, dtype=torch.float32))


class Matrices4(_Stored):
    """`lead` matrices `[N, K]` in 4 bits, each made of parts; unset until `put`.

    The parts' rows lie one part after the other, or, `interleaved`, by turns of `GROUP` rows.
    """

    packed: Tensor
    """uint8 `[*lead, N, K / 2]`"""
    absmax: Tensor
    """`[*lead, N, K / 64]`: float32 or bfloat16; uint8 where it is nested."""
    nested_absmax: Tensor
    """float32 `[*lead, groups]`, one part after the other; only where absmax is nested."""
    nested_offset: Tensor
    """float32 `[*lead, parts]`; only where absmax is nested."""

    def __init__(
        self,
        codes: Codes,
        lead: tuple[int, ...],
        columns: int,
        rows: tuple[int, ...],
        *,
        interleaved: bool = False,
    ) -> None:
        super().__init__()
        self.codes = codes
        self.rows = list(rows)
        self.interleaved = interleaved
        self.groups = [-(-count * columns // GROUP_SIZE // NESTED_GROUP_SIZE) for count in rows]
        is_nested = codes.quantization.absmax == "nested"
        dtype = torch.uint8 if is_nested else getattr(torch, codes.quantization.absmax)
        shape = (*lead, sum(rows))
        self.register_buffer("packed", torch.empty(*shape, columns // 2, dtype=torch.uint8))
        self.register_buffer("absmax", torch.empty(*shape, columns // GROUP_SIZE, dtype=dtype))
        if is_nested:
            groups = torch.empty(*lead, sum(self.groups), dtype=torch.float32)
            self.register_buffer("nested_absmax", groups)
            offset = torch.empty(*lead, len(rows), dtype=torch.float32)
            self.register_buffer("nested_offset", offset)

    def put(self, index: tuple[int, ...], part: int, weight: Tensor | Quantized) -> None:
        """Fills part `part` of matrix `index` with `weight` `[rows[part], K]`.

        Floats are quantised, on the device where the buffers are. What is quantised already keeps
        its nibbles, and its absmax where that is stored alike.
        """
        chosen = self.codes.quantization
        if isinstance(weight, Tensor):
            weight = quantize(weight.to(self.packed.device), chosen.quant_type, chosen.absmax)
        self.codes.code.copy_(weight.code)
        self._rows(self.packed[index], part).copy_(self._grouped(weight.packed))
        if chosen.absmax != "nested":
            absmax = plain_absmax(weight.absmax, weight.nested)
        elif weight.nested is None:
            absmax, nested = quantize_absmax(weight.absmax.float())
            self._put_nested(index, part, nested)
        else:
            absmax = weight.absmax
            self._put_nested(index, part, weight.nested)
        self._rows(self.absmax[index], part).copy_(self._grouped(absmax))

    def get(self, index: Index = ()) -> Quantized:
        """Matrix (or matrices) `index`, rows as they lie here and plain absmax, to `dequantize`."""
        stored = self.absmax[index]
        if self.codes.quantization.absmax != "nested":
            return Quantized(self.packed[index], stored, self.codes.code)
        absmax = torch.empty(stored.shape, dtype=torch.float32, device=stored.device)
        groups = torch.split(self.nested_absmax[index], self.groups, dim=-1)
        offsets = self.nested_offset[index]
        for part, count in enumerate(self.rows):
            nested = Nested(groups[part], self.codes.nested_code, offsets[..., part])
            numbers = self._rows(stored, part)
            plain = plain_absmax(numbers.reshape(*stored.shape[:-2], count, -1), nested)
            self._rows(absmax, part).copy_(plain.view(numbers.shape))
        return Quantized(self.packed[index], absmax, self.codes.code)

    def floats(self, index: Index, dtype: torch.dtype) -> Tensor:
        """Matrix (or matrices) `index` `[..., N, K]`, rows as they lie here."""
        if self.codes.unpack is not None:
            return self.codes.unpack(self, index)
        return dequantize(self.get(index), dtype)

    def _put_nested(self, index: tuple[int, ...], part: int, nested: Nested) -> None:
        self.codes.nested_code.copy_(nested.code)
        torch.split(self.nested_absmax[index], self.groups)[part].copy_(nested.absmax)
        self.nested_offset[index][part].copy_(nested.offset)

    def _rows(self, stored: Tensor, part: int) -> Tensor:
        """One part of `stored` `[..., N, c]`, a view: `[..., n, c]`, or `[..., n / 8, 8, c]`."""
        if not self.interleaved:
            return torch.split(stored, self.rows, dim=-2)[part]
        shape = (*stored.shape[:-2], -1, len(self.rows), GROUP, stored.shape[-1])
        return stored.view(shape)[..., part, :, :]

    def _grouped(self, rows: Tensor) -> Tensor:
        """One part's `rows` `[n, c]` in the shape of `_rows`."""
        return rows.reshape(-1, GROUP, rows.shape[-1]) if self.interleaved else rows


class Linear4(nn.Module):
    """`Linear` with a weight in 4 bits, which each product unpacks anew."""

    def __init__(self, codes: Codes, columns: int, rows: tuple[int, ...]) -> None:
        super().__init__()
        self.matrix = Matrices4(codes, (), columns, rows)

    def put(self, part: int, weight: Tensor | Quantized) -> None:
        """Fills the rows of one of the matrices, quantising floats."""
        self.matrix.put((), part, weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix.floats((), x.dtype))
