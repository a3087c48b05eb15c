"""Weights in 4 bits as buffers of a module, in the layout of the kernels and of fused checkpoints.

`quantize.py` defines what the bytes mean; this module holds them. Matrices with the same input (q,
k and v; gate and up) are one matrix here. A checkpoint keeps them apart and has quantized them
apart, which matters where absmax is nested: every part keeps its own scales and offset.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from serve_app.model.kernels.cuda.tiles import (
    absmax_from_tiles,
    absmax_to_tiles,
    codes_from_tiles,
    codes_to_tiles,
)
from serve_app.model.quantization import (
    GROUP_SIZE,
    NUM_CODES,
    NUM_NESTED_CODES,
    Quantization,
    num_nested_groups,
)
from serve_app.model.quantize import (
    NestedAbsmax,
    QuantizedTensor,
    absmax_dtype,
    absmax_values,
    dequantize,
    quantize,
    quantize_absmax,
)

INTERLEAVED_ROWS = 8
"""Rows of gate, then as many of up, and so on: a kernel's tile of 16 rows has both of a pair."""

Index = tuple[int, ...] | Tensor
"""Which matrices of a stack: one by its number, all with (), or several by an int64 tensor."""


class _Storage(nn.Module):
    """A module whose buffers keep their dtypes when the model is moved to another dtype."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # As bytes: `model.to(torch.bfloat16)` must change the model's floats, not these.
        def move(stored: Tensor) -> Tensor:
            return fn(stored.view(torch.uint8)).view(stored.dtype)

        return super()._apply(move, recurse)  # type: ignore[no-untyped-call]


class Codebook(_Storage):
    """The values that the codes of all 4-bit weights of a model stand for; all weights share it."""

    code: Tensor
    """float32 `[16]`: the value of each nibble."""
    nested_code: Tensor
    """float32 `[256]`: the value of each absmax in 8 bits; exists only where absmax is nested."""

    def __init__(self, quantization: Quantization) -> None:
        super().__init__()
        self.quantization = quantization
        self.unpack: Callable[[QuantizedWeight, Index], Tensor] | None = None
        """A kernel that dequantizes faster than plain torch; None where there is none."""
        self.register_buffer("code", torch.empty(NUM_CODES, dtype=torch.float32))
        if quantization.absmax == "nested":
            values = torch.empty(NUM_NESTED_CODES, dtype=torch.float32)
            self.register_buffer("nested_code", values)


def expand_absmax(codebook: Codebook, weights: Iterable["QuantizedWeight"]) -> None:
    """Turns nested absmax into bfloat16: in `weights`, all that share `codebook`, and in it."""
    if codebook.quantization.absmax != "nested":
        return
    for weight in weights:
        weight.absmax = weight.bfloat16_absmax()
        del weight.nested_absmax, weight.nested_offset
    del codebook.nested_code
    codebook.quantization = replace(codebook.quantization, absmax="bfloat16")


class QuantizedWeight(_Storage):
    """A matrix `[N, K]` in 4 bits, or a stack of them, made of parts; unset until `load_weight`.

    N is `sum(out_features)`, K is `in_features`. The rows of the parts lie one part after the
    other, or, `interleaved`, by turns: rows 0 to 7 of gate, rows 0 to 7 of up, rows 8 to 15 of gate
    and so on.
    """

    packed: Tensor
    """uint8 `[*stack, N, K / 2]`"""
    absmax: Tensor
    """`[*stack, N, K / 64]`: bfloat16 (float32 on its way to a file), or uint8 where nested."""
    nested_absmax: Tensor
    """float32 `[*stack, nested groups]`, one part after the other; only where absmax is nested."""
    nested_offset: Tensor
    """float32 `[*stack, parts]`; only where absmax is nested."""

    def __init__(
        self,
        codebook: Codebook,
        stack: tuple[int, ...],
        in_features: int,
        out_features: tuple[int, ...],
        *,
        interleaved: bool = False,
    ) -> None:
        """`stack`: `(num_experts,)` for a matrix per expert, () for one matrix."""
        super().__init__()
        self.codebook = codebook
        self.out_features = list(out_features)
        self.interleaved = interleaved
        self.is_tiled = False
        """Whether `packed` and `absmax` are in the order of `kernels/cuda/tiles.py`."""
        self.num_nested_groups = [num_nested_groups(size * in_features) for size in out_features]
        absmax = codebook.quantization.absmax
        shape = (*stack, sum(out_features))
        packed = torch.empty(*shape, in_features // 2, dtype=torch.uint8)
        self.register_buffer("packed", packed)
        scales = torch.empty(*shape, in_features // GROUP_SIZE, dtype=absmax_dtype(absmax))
        self.register_buffer("absmax", scales)
        if absmax == "nested":
            groups = torch.empty(*stack, sum(self.num_nested_groups), dtype=torch.float32)
            self.register_buffer("nested_absmax", groups)
            offset = torch.empty(*stack, len(out_features), dtype=torch.float32)
            self.register_buffer("nested_offset", offset)

    def load_weight(
        self, weight: Tensor | QuantizedTensor, expert: int | None = None, part: int = 0
    ) -> None:
        """Fills part `part` of the matrix, or of `expert`'s, from `weight` `[out_features, K]`.

        Floats are quantized, on the device of the buffers. A quantized weight keeps its nibbles,
        and its absmax but for the rounding to this module's dtype.
        """
        index = () if expert is None else (expert,)
        quantization = self.codebook.quantization
        if isinstance(weight, Tensor):
            on_device = weight.to(self.packed.device)
            weight = quantize(on_device, quantization.quant_type, quantization.absmax)
        self.codebook.code.copy_(weight.code)
        self._part(self.packed[index], part).copy_(self._by_turns(weight.packed))
        absmax = weight.absmax
        if quantization.absmax != "nested":
            absmax = absmax_values(weight.absmax, weight.nested)
        else:
            nested = weight.nested
            if nested is None:
                absmax, nested = quantize_absmax(weight.absmax.float())
            self._load_nested(index, part, nested)
        self._part(self.absmax[index], part).copy_(self._by_turns(absmax))

    def bfloat16_absmax(self) -> Tensor:
        """absmax `[*stack, N, K / 64]` as numbers that multiply, computed a matrix at a time."""
        made = torch.empty(self.absmax.shape, dtype=torch.bfloat16, device=self.absmax.device)
        for index in product(*map(range, made.shape[:-2])):
            made[index] = self.get(index).absmax
        return made

    def to_tiles(self) -> None:
        """Reorders codes and absmax in place; absmax must be bfloat16. No weight is loaded then."""
        self._reorder(codes_to_tiles, absmax_to_tiles)
        self.is_tiled = True

    def from_tiles(self) -> None:
        """The inverse of `to_tiles`."""
        self._reorder(codes_from_tiles, absmax_from_tiles)
        self.is_tiled = False

    def _reorder(
        self, codes: Callable[[Tensor], Tensor], scales: Callable[[Tensor], Tensor]
    ) -> None:
        for stored, reordered in ((self.packed, codes), (self.absmax, scales)):
            for matrix in stored.view(-1, *stored.shape[-2:]):  # a copy of one matrix at a time
                matrix.copy_(reordered(matrix))

    def get(self, index: Index = ()) -> QuantizedTensor:
        """Matrices `index` `[..., N, K]`, rows as they lie here, with an absmax that multiplies."""
        stored = self.absmax[index]
        if self.is_tiled:
            packed, absmax = codes_from_tiles(self.packed[index]), absmax_from_tiles(stored)
            return QuantizedTensor(packed, absmax, self.codebook.code)
        if self.codebook.quantization.absmax != "nested":
            return QuantizedTensor(self.packed[index], stored, self.codebook.code)
        absmax = torch.empty(stored.shape, dtype=torch.float32, device=stored.device)
        groups = torch.split(self.nested_absmax[index], self.num_nested_groups, dim=-1)
        offsets = self.nested_offset[index]
        for part, size in enumerate(self.out_features):
            nested = NestedAbsmax(groups[part], self.codebook.nested_code, offsets[..., part])
            numbers = self._part(stored, part)
            values = absmax_values(numbers.reshape(*stored.shape[:-2], size, -1), nested)
            self._part(absmax, part).copy_(values.view(numbers.shape))
        return QuantizedTensor(self.packed[index], absmax, self.codebook.code)

    def floats(self, index: Index, dtype: torch.dtype) -> Tensor:
        """Matrices `index` `[..., N, K]` dequantized, rows as they lie here."""
        if self.codebook.unpack is not None:
            return self.codebook.unpack(self, index)
        return dequantize(self.get(index), dtype)

    def _load_nested(self, index: tuple[int, ...], part: int, nested: NestedAbsmax) -> None:
        self.codebook.nested_code.copy_(nested.code)
        groups = torch.split(self.nested_absmax[index], self.num_nested_groups)
        groups[part].copy_(nested.absmax)
        self.nested_offset[index][part].copy_(nested.offset)

    def _part(self, stored: Tensor, part: int) -> Tensor:
        """A view of one part of `stored` `[..., N, c]`: `[..., n, c]`, or `[..., n / 8, 8, c]`."""
        if not self.interleaved:
            return torch.split(stored, self.out_features, dim=-2)[part]
        turns = (-1, len(self.out_features), INTERLEAVED_ROWS)
        return stored.view(*stored.shape[:-2], *turns, stored.shape[-1])[..., part, :, :]

    def _by_turns(self, rows: Tensor) -> Tensor:
        """One part's `rows` `[n, c]` in the shape of `_part`."""
        if not self.interleaved:
            return rows
        return rows.reshape(-1, INTERLEAVED_ROWS, rows.shape[-1])
