"""Weights in 4 bits as buffers of a module, in the one form that all kernels and torch read.

`quantize.py` defines what the codes mean; this module holds them. Matrices with the same input (q,
k and v; gate and up) are one matrix here. Codes and absmax lie in tiles (`kernels/cuda/tiles.py`)
where the sizes fill them, and row by row otherwise; absmax is bfloat16.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from serve_app.model.kernels.cuda import tiles
from serve_app.model.quantization import GROUP_SIZE, NUM_CODES, QuantType
from serve_app.model.quantize import QuantizedTensor, absmax_values, dequantize, quantize

INTERLEAVED_ROWS = tiles.HALF
"""Rows of gate, then as many of up, and so on: a tile of 16 rows has both of a pair."""

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

    def __init__(self, quant_type: QuantType) -> None:
        super().__init__()
        self.quant_type: QuantType = quant_type
        self.unpack: Callable[[QuantizedWeight, Index], Tensor] | None = None
        """A kernel that dequantizes faster than plain torch; None if there is none."""
        self.register_buffer("code", torch.empty(NUM_CODES, dtype=torch.float32))


class QuantizedWeight(_Storage):
    """A matrix `[N, K]` in 4 bits, or a stack of them, made of parts; unset until `load_weight`.

    N is `sum(out_features)`, K is `in_features`. The rows of the parts lie one part after the
    other, or, `interleaved`, by turns: rows 0 to 7 of gate, rows 0 to 7 of up, rows 8 to 15 of gate
    and so on.
    """

    packed: Tensor
    """uint8 `[*stack, N, K / 2]`: the codes."""
    absmax: Tensor
    """bfloat16 `[*stack, N, K / 64]`"""

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
        self.is_tiled = tiles.fits(out_features, in_features, interleaved=interleaved)
        """Whether `packed` and `absmax` are in tiles."""
        shape = (*stack, sum(out_features))
        packed = torch.empty(*shape, in_features // 2, dtype=torch.uint8)
        self.register_buffer("packed", packed)
        absmax = torch.empty(*shape, in_features // GROUP_SIZE, dtype=torch.bfloat16)
        self.register_buffer("absmax", absmax)

    def load_weight(
        self, weight: Tensor | QuantizedTensor, expert: int | None = None, part: int = 0
    ) -> None:
        """Fills part `part` of the matrix, or of `expert`'s, from `weight` `[out_features, K]`.

        Floats are quantized, on the device of the buffers. A quantized weight keeps its nibbles;
        its absmax, float32 or nested, is rounded to bfloat16.
        """
        index, device = () if expert is None else (expert,), self.packed.device
        if isinstance(weight, Tensor):
            weight = quantize(weight.to(device), self.codebook.quant_type, "bfloat16")
        self.codebook.code.copy_(weight.code)
        absmax = absmax_values(weight.absmax, weight.nested).to(torch.bfloat16).to(device)
        codes = weight.packed.to(device)
        if self.is_tiled:
            codes = codes.contiguous().view(torch.int32)
        for target, rows in zip(self._parts(index, part), (codes, absmax), strict=True):
            target.copy_(rows.reshape(target.shape))

    def part(self, index: tuple[int, ...], part: int) -> QuantizedTensor:
        """Part `part` of matrix `index` `[out_features, K]`, row by row: what `load_weight` got."""
        size, half = self.out_features[part], self.packed.shape[-1]
        codes, absmax = (rows.contiguous() for rows in self._parts(index, part))
        codes, absmax = codes.view(torch.uint8).view(size, half), absmax.view(size, -1)
        return QuantizedTensor(codes, absmax, self.codebook.code)

    def to_tiles(self) -> None:
        """Reorders codes and absmax, which lie row by row, in place."""
        self.is_tiled = True
        for stored, order in (
            (self.packed, tiles.codes_to_tiles),
            (self.absmax, tiles.absmax_to_tiles),
        ):
            for matrix in stored.view(-1, *stored.shape[-2:]):  # a copy of one matrix at a time
                matrix.copy_(order(matrix))

    def get(self, index: Index = ()) -> QuantizedTensor:
        """Matrices `index` `[..., N, K]` row by row, parts interleaved as they are here."""
        packed, absmax = self.packed[index], self.absmax[index]
        if self.is_tiled:
            packed, absmax = tiles.codes_from_tiles(packed), tiles.absmax_from_tiles(absmax)
        return QuantizedTensor(packed, absmax, self.codebook.code)

    def floats(self, index: Index, dtype: torch.dtype) -> Tensor:
        """Matrices `index` `[..., N, K]` dequantized, row by row."""
        if self.codebook.unpack is not None:
            return self.codebook.unpack(self, index)
        return dequantize(self.get(index), dtype)

    def rows_of_parts(self, matrix: Tensor) -> tuple[Tensor, ...]:
        """Returns the views of each part's rows in `matrix` `[N, c]`, which lies row by row.

        Their shape is `[n, c]`, or, interleaved, `[n / 8, 8, c]`.
        """
        if not self.interleaved:
            return torch.split(matrix, self.out_features)
        turns = (-1, len(self.out_features), INTERLEAVED_ROWS)
        return matrix.view(*turns, matrix.shape[-1]).unbind(1)

    def _parts(self, index: tuple[int, ...], part: int) -> tuple[Tensor, Tensor]:
        """Returns the views of one part's codes and absmax in matrix `index`, in the order of its
        rows.

        In tiles they are those of `tiles.code_rows` and `tiles.absmax_rows`.
        """
        codes, absmax = self.packed[index], self.absmax[index]
        if not self.is_tiled:
            return self.rows_of_parts(codes)[part], self.rows_of_parts(absmax)[part]
        if self.interleaved:  # a part has half of every tile
            return tiles.code_rows(codes)[:, part], tiles.absmax_rows(absmax)[:, part]
        codes, absmax = (torch.split(it, self.out_features)[part] for it in (codes, absmax))
        return tiles.code_rows(codes), tiles.absmax_rows(absmax)
