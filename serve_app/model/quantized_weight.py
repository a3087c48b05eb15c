"""QuantizedWeight: 4-bit weights as buffers of a module, in the layout of all kernels and of torch.

`quantize.py` defines the values of the codes; this module stores them. Matrices with the same input
(q, k and v; gate and up) are one matrix here. Codes and absmax are stored in tiles
(`kernels/cuda/tiles.py`) if the sizes are multiples of a tile's, otherwise row by row. absmax is
bfloat16.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from serve_app.model.kernels.cuda import tiles
from serve_app.model.quantization import GROUP_SIZE, NUM_CODES, QuantType
from serve_app.model.quantize import QuantizedTensor, absmax_values, dequantize, quantize

INTERLEAVED_ROWS = tiles.HALF
"""Number of adjacent rows of gate, which are followed by as many rows of up. A tile of 16 rows then
contains both factors of each product silu(gate) * up."""

Index = tuple[int, ...] | Tensor
"""An index of matrices in a stack: `(3,)` for one matrix, `()` for all, or an int64 tensor for
several."""


class _Storage(nn.Module):
    """A module whose buffers keep their dtypes when the model is moved to another dtype."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Passes the buffer as bytes, because `model.to(torch.bfloat16)` must not convert it.
        def move(buffer: Tensor) -> Tensor:
            return fn(buffer.view(torch.uint8)).view(buffer.dtype)

        return super()._apply(move, recurse)  # type: ignore[no-untyped-call]


class Codebook(_Storage):
    """The values of the codes. All 4-bit weights of a model share one codebook."""

    code: Tensor
    """float32 `[16]`: the value of each nibble."""

    def __init__(self, quant_type: QuantType) -> None:
        super().__init__()
        self.quant_type: QuantType = quant_type
        self.unpack: Callable[[QuantizedWeight, Index], Tensor] | None = None
        """A kernel that dequantizes faster than plain torch; None if there is none."""
        self.register_buffer("code", torch.empty(NUM_CODES, dtype=torch.float32))


class QuantizedWeight(_Storage):
    """A 4-bit matrix `[N, K]`, or a stack of them, concatenated from parts. `load_weight` fills it.

    N is `sum(out_features)`, K is `in_features`. The rows are one part after the other. With
    `interleaved`, they alternate: rows 0 to 7 of gate, rows 0 to 7 of up, rows 8 to 15 of gate, and
    so on.
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
        """`stack` is `(num_experts,)` for one matrix per expert, or () for a single matrix."""
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
        """Fills part `part` of the matrix, or of `expert`'s matrix, from `weight` `[out_features,
        K]`.

        Floats are quantized on the device of the buffers. A quantized weight keeps its nibbles; its
        absmax, float32 or nested, is rounded to bfloat16.
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
        """Returns part `part` of matrix `index`, `[out_features, K]`, row by row: the inverse of
        `load_weight`."""
        size, half = self.out_features[part], self.packed.shape[-1]
        codes, absmax = (rows.contiguous() for rows in self._parts(index, part))
        codes, absmax = codes.view(torch.uint8).view(size, half), absmax.view(size, -1)
        return QuantizedTensor(codes, absmax, self.codebook.code)

    def to_tiles(self) -> None:
        """Reorders codes and absmax from row by row to tiles, in place."""
        self.is_tiled = True
        for tensor, order in (
            (self.packed, tiles.codes_to_tiles),
            (self.absmax, tiles.absmax_to_tiles),
        ):
            for matrix in tensor.view(-1, *tensor.shape[-2:]):  # a copy of one matrix at a time
                matrix.copy_(order(matrix))

    def get(self, index: Index = ()) -> QuantizedTensor:
        """Returns the matrices `index` `[..., N, K]` row by row; interleaved parts stay
        interleaved."""
        packed, absmax = self.packed[index], self.absmax[index]
        if self.is_tiled:
            packed, absmax = tiles.codes_from_tiles(packed), tiles.absmax_from_tiles(absmax)
        return QuantizedTensor(packed, absmax, self.codebook.code)

    def floats(self, index: Index, dtype: torch.dtype) -> Tensor:
        """Returns the matrices `index` `[..., N, K]` dequantized, row by row."""
        if self.codebook.unpack is not None:
            return self.codebook.unpack(self, index)
        return dequantize(self.get(index), dtype)

    def rows_of_parts(self, matrix: Tensor) -> tuple[Tensor, ...]:
        """Returns views of each part's rows in `matrix` `[N, c]`, which is stored row by row.

        Their shape is `[n, c]`, or `[n / 8, 8, c]` if the parts are interleaved.
        """
        if not self.interleaved:
            return torch.split(matrix, self.out_features)
        turns = (-1, len(self.out_features), INTERLEAVED_ROWS)
        return matrix.view(*turns, matrix.shape[-1]).unbind(1)

    def _parts(self, index: tuple[int, ...], part: int) -> tuple[Tensor, Tensor]:
        """Returns views of one part's codes and absmax in matrix `index`, in the order of its rows.

        If the weight is tiled, the views have the shapes of `tiles.code_rows` and
        `tiles.absmax_rows`.
        """
        codes, absmax = self.packed[index], self.absmax[index]
        if not self.is_tiled:
            return self.rows_of_parts(codes)[part], self.rows_of_parts(absmax)[part]
        if self.interleaved:  # a part has half of every tile
            return tiles.code_rows(codes)[:, part], tiles.absmax_rows(absmax)[:, part]
        codes, absmax = (torch.split(tensor, self.out_features)[part] for tensor in (codes, absmax))
        return tiles.code_rows(codes), tiles.absmax_rows(absmax)
