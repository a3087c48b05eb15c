"""Products with 4-bit weights for a few tokens on a GPU, in Triton. Codes are decoded in registers.

`dense` multiplies by one matrix. `gate_up` (with silu(gate) * up in the same launch) and `down`
multiply by the experts of a layer, with tokens grouped by expert. A launch reads each weight once
for up to a tile of its tokens. Weights must be in tiles, and the rows of gate and up must be
interleaved (`QuantizedWeight`).

The sum over K always has `SPLIT_K` parts, which are added in their order. So a token gets the same
bits in any batch that has the same tile. Code values are rounded to the activations' dtype, and a
sum is scaled after each quantization group, so results differ from a product with `dequantize` by
at most 2e-3.

On a CPU, tests run the kernels in Triton's interpreter, which reads the code values from memory. On
a GPU the assembly in `nf4_ptx.py` decodes; tests check it separately. On an H200 (torch 2.11,
Triton 3.6), gate_up of Mixtral 8x7B takes 112 us for 1 token and 361 us for 8, down 79 and 188 us:
about 1,100 GB/s, where a copy reaches 4,200. The limit is decoding, not memory: a CUDA prototype
with the code values in shared memory takes 39 and 146 us for gate_up.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from serve_app.model.kernels.triton.nf4_kernels import dense_kernel, down_kernel, gate_up_kernel
from serve_app.model.kernels.triton.nf4_ptx import planes
from serve_app.model.quantization import GROUP_SIZE
from serve_app.model.quantized_weight import QuantizedWeight

SPLIT_K = 2
"""Number of parts of each sum over K."""
GATE_UP_ROWS = 128
"""Number of weight rows of a tile of `gate_up`; see `rows_of` for the other products."""


@dataclass(frozen=True)
class Packed:
    """A `QuantizedWeight` in the form that the kernels read; it shares the memory."""

    packed: Tensor
    """uint8 `[E, N, K / 2]`, in tiles."""
    absmax: Tensor
    """bfloat16 `[E, N, K / 64]`, in tiles."""
    code: Tensor
    """The 16 code values in the activations' dtype, for Triton's interpreter."""
    planes: dict[str, int]
    """The same values from `nf4_ptx.planes`, for a GPU."""

    @classmethod
    def from_weight(cls, matrices: QuantizedWeight, dtype: torch.dtype) -> "Packed":
        assert matrices.is_tiled
        rows, in_features = matrices.packed.shape[-2], 2 * matrices.packed.shape[-1]
        code = matrices.codebook.code
        return cls(
            matrices.packed.view(-1, rows, in_features // 2),
            matrices.absmax.view(-1, rows, in_features // GROUP_SIZE),
            code.to(dtype),
            planes(code.tolist(), is_bfloat16=dtype == torch.bfloat16),
        )

    @property
    def out_features(self) -> int:
        """N"""
        return self.packed.shape[1]

    @property
    def in_features(self) -> int:
        """K"""
        return 2 * self.packed.shape[2]

    def arguments(self, rows: int, splits: int) -> dict[str, object]:
        """Returns the kernel arguments for these weights, with tiles of `rows` rows and sums in
        `splits` parts."""
        return {
            "packed": self.packed,
            "absmax": self.absmax,
            "code": self.code,
            "HAS_PTX": self.packed.device.type == "cuda",
            **self.planes,
            "N": self.out_features,
            "K": self.in_features,
            "ROWS": rows,
            "GROUPS": next(n for n in (2, 1) if self.absmax.shape[2] % (n * splits) == 0 or n == 1),
        }


def tile_of(tokens: int) -> int:
    """Returns the number of tokens of a tile for a batch of `tokens`.

    Few experts have more tokens than one tile. Example: if 32 tokens use 2 of 8 experts each, an
    expert has 8 tokens on average, and a tile has 32.
    """
    return 16 if tokens <= 16 else 32 if tokens <= 64 else 64


def rows_of(tile: int) -> int:
    """Returns the number of weight rows of a tile. Large tiles need fewer instructions per row;
    small tiles use more multiprocessors."""
    return 128 if tile == 64 else 64


def shape_of(tile: int, rows: int) -> dict[str, int]:
    """Returns the options of a launch, with the fewest warps whose registers hold a tile's sums."""
    return {"num_warps": 8 if tile * rows >= 32 * 128 else 4, "num_stages": 3}


def dense(weights: Packed, x: Tensor, out: Tensor) -> None:
    """Fills `out` float32 `[SPLIT_K, T, N]`, the parts of the product, from `x` `[T, K]`."""
    tile = tile_of(len(x))
    rows = rows_of(tile)
    grid = (triton.cdiv(len(x), tile), triton.cdiv(out.shape[2], rows), SPLIT_K)
    more = {**weights.arguments(rows, SPLIT_K), **shape_of(tile, rows)}
    dense_kernel[grid](x, out, len(x), TILE=tile, SPLIT_K=SPLIT_K, **more)


def gate_up(
    weights: Packed, x: Tensor, order: Tensor, starts: Tensor, top_k: int, out: Tensor
) -> None:
    """Fills `out` `[T * k, I]`, in the order of experts, from `x` `[T, K]`.

    The entry token * k + j is the jth expert of a token. `order` int32 `[T * k]` has the entries
    sorted by expert; the entries of expert e are `order[starts[e] : starts[e + 1]]`, with `starts`
    int32 `[E + 1]`. Rows of `out` after the rows of the last expert are not written.

    Example: the experts [[0, 2], [0, 1]] of two tokens give `order` [0, 2, 3, 1] and `starts`
    [0, 2, 3, 4].
    """
    tile, arguments = tile_of(len(x)), weights.arguments(GATE_UP_ROWS, 1)
    experts, rows = weights.packed.shape[:2]
    grid = (triton.cdiv(len(x), tile), triton.cdiv(rows, GATE_UP_ROWS), experts)
    shape = shape_of(tile, GATE_UP_ROWS)
    gate_up_kernel[grid](x, order, starts, out, TILE=tile, TOP_K=top_k, **arguments, **shape)


def down(
    weights: Packed,
    x: Tensor,
    order: Tensor,
    starts: Tensor,
    topk_weights: Tensor,
    top_k: int,
    out: Tensor,
) -> None:
    """Fills `out` float32 `[SPLIT_K, T * k, N]` from `x`, the output of `gate_up`.

    `out` is in the order of entries. Each row is multiplied by its entry's `topk_weights`, float32
    `[T * k]`. The caller adds the parts, and the k rows of each token.
    """
    tokens = len(x) // top_k
    tile = tile_of(tokens)
    rows = rows_of(tile)
    experts, height = weights.packed.shape[:2]
    grid = (triton.cdiv(tokens, tile), triton.cdiv(height, rows), experts * SPLIT_K)
    more = {**weights.arguments(rows, SPLIT_K), **shape_of(tile, rows)}
    routing = (order, starts, topk_weights)
    down_kernel[grid](x, *routing, out, len(x), TILE=tile, SPLIT_K=SPLIT_K, **more)
