"""Products with 4-bit weights in tiles for a few tokens on a GPU, and dequantizing for prompts.

The functions compute the same as the functions of `triton/nf4_decode.py` with the same names, but
return complete sums over K instead of parts. Activations and results of `gate_up` are bfloat16. A
pass reads each weight once and computes at most a fixed number of tokens, which depends on the
kernel's variant; more tokens need more passes. The order of the sums over K depends only on the
variant, so a token gets the same bits in any batch with the same variant.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from serve_app.model.kernels.cuda.launchable import Launchable, MakeKernel
from serve_app.model.kernels.cuda.launcher import Grid
from serve_app.model.kernels.cuda.sampling import SampleKernel
from serve_app.model.kernels.cuda.step_kernels import StepKernels
from serve_app.model.kernels.cuda.tiles import pairs_of
from serve_app.model.kernels.cuda.variants import (
    DENSE,
    DOWN,
    GATE_UP,
    Card,
    Variant,
    batch_of,
    macros,
    shared_bytes,
    variants,
)

UNPACK_THREADS = 1024
"""Number of threads of a block of unpack.cu. A block takes all registers of a multiprocessor."""
UNPACK_SHARE = 1 / 3
"""Share of the multiprocessors that unpack.cu uses; the others compute a product at the same time.
A program of the grouped product has 240 registers a thread on an H200, so no block of another
kernel fits on the same multiprocessor. Measured on an H200 with 8 layers, for 1,024 tokens: 22.6
ms with a quarter, 21.6 with a third, 21.8 with half, 23.0 with all. For 4,096 tokens the share made
no difference."""
UNPACK_STRIDE = 32
"""Number of words in unpack.cu's table for each value of a byte."""


@dataclass(frozen=True)
class TiledWeight:
    """A matrix in tiles, or a stack of them, as the kernels read it."""

    codes: Tensor
    """uint8 `[E, N, K / 2]`, see `tiles.py` for the order."""
    absmax: Tensor
    """bfloat16 `[E, N, K / 64]`"""

    @property
    def num_matrices(self) -> int:
        """E"""
        return self.codes.shape[0]

    @property
    def out_features(self) -> int:
        """N"""
        return self.codes.shape[1]

    @property
    def in_features(self) -> int:
        """K"""
        return self.codes.shape[2] * 2


class CudaProducts:
    """The kernels of one model on one card."""

    def __init__(
        self,
        card: Card,
        code: Tensor,
        sizes: dict[str, set[tuple[int, int]]],
        top_k: int,
        make: MakeKernel,
    ) -> None:
        """`code` has the 16 code values, on the device. `sizes` has all pairs of N and K of
        the matrices of each of the products DENSE, GATE_UP and DOWN."""
        self._pairs = pairs_of(code).to(code.device)
        self._kernels: dict[tuple[str, int, int, int], Launchable] = {}
        made: dict[tuple[str, int, Variant], Launchable] = {}
        for product, matrices in sizes.items():
            for rows, columns in sorted(matrices):
                for batch, variant in variants(product, card, rows).items():
                    kind = product, columns, variant
                    if kind not in made:
                        blocks = card.multiprocessors * variant.blocks_per_sm
                        shared = shared_bytes(variant, card)
                        grid = Grid(blocks, variant.threads, shared, card.overlaps_kernels)
                        options = macros(variant, product, card, columns, top_k)
                        made[kind] = make(variant.source, options, grid)
                    self._kernels[product, rows, columns, batch] = made[kind]
        tiles = (variant.token_tiles for product, _, variant in made if product == GATE_UP)
        self.pass_tokens = 8 * max(tiles, default=0)
        """Number of an expert's tokens that the largest kernel of gate_up computes at once."""
        blocks = max(1, int(UNPACK_SHARE * card.multiprocessors))
        grid = Grid(blocks, UNPACK_THREADS, 1024 * UNPACK_STRIDE)
        self._unpack = make("unpack", (), grid)
        self.step_kernels: StepKernels | None = None
        """The other kernels of a decode step; None if they cannot be used."""
        self.step_problem = "they are not compiled"
        """The reason why `step_kernels` is None."""
        self.make_sampler: Callable[[int], SampleKernel] | None = None
        """Compiles the sampler for a maximum number of rows. Raises `StepUnavailable`."""

    def dense(self, weight: TiledWeight, x: Tensor, out: Tensor) -> None:
        """Fills `out` float32 `[T, N]` with x @ weight.T, for `x` `[T, K]`."""
        self._launch(DENSE, weight, x, None, None, None, out, len(x))

    def gate_up(
        self, weight: TiledWeight, x: Tensor, order: Tensor, starts: Tensor, out: Tensor
    ) -> None:
        """Fills `out` `[T * k, I]` with silu(gate) * up of `x` `[T, K]`, in the order of experts.

        See `nf4_decode.gate_up` for `order` and `starts`. Rows of `out` after the rows of the last
        expert are not written.
        """
        self._launch(GATE_UP, weight, x, order, starts, None, out, len(x))

    def down(
        self,
        weight: TiledWeight,
        x: Tensor,
        order: Tensor,
        starts: Tensor,
        topk_weights: Tensor,
        top_k: int,
        out: Tensor,
    ) -> None:
        """Fills `out` float32 `[T * k, N]`, in the order of entries.

        `x` is the output of `gate_up`. Each row is multiplied by its entry's `topk_weights`
        (float32 `[T * k]`). Rows of entries without an expert (padding) are not written.
        """
        tokens = len(x) // top_k
        self._launch(DOWN, weight, x, order, starts, topk_weights, out, tokens)

    def experts(
        self,
        gate_up: TiledWeight,
        down: TiledWeight,
        x: Tensor,
        order: Tensor,
        starts: Tensor,
        topk_weights: Tensor,
    ) -> Tensor:
        """Returns the outputs of `gate_up` and then `down` for `x` bfloat16 `[T, K]`: float32
        `[T * k, N]`, by entry."""
        inner = x.new_empty(len(order), down.in_features)
        self.gate_up(gate_up, x, order, starts, inner)
        out = x.new_empty(len(order), down.out_features, dtype=torch.float32)
        self.down(down, inner, order, starts, topk_weights, len(order) // len(x), out)
        return out

    def unpack(self, weight: TiledWeight, indices: Tensor) -> Tensor:
        """Returns matrices `indices` (int64 `[n]`) of a stack as bfloat16 `[n, N, K]`."""
        shape = (len(indices), weight.out_features, weight.in_features)
        out = torch.empty(shape, dtype=torch.bfloat16, device=indices.device)
        self.unpack_into(weight, indices, out)
        return out

    def unpack_into(self, weight: TiledWeight, indices: Tensor, out: Tensor) -> None:
        """The same as `unpack`, but writes to `out` `[n, N, K]`."""
        tensors = (weight.codes, weight.absmax, self._pairs, indices, out)
        sizes = (len(indices), weight.out_features // 16, weight.in_features // 64)
        self._unpack.launch(*tensors, *sizes)

    def _launch(
        self,
        product: str,
        weight: TiledWeight,
        x: Tensor,
        order: Tensor | None,
        starts: Tensor | None,
        topk_weights: Tensor | None,
        out: Tensor,
        tokens: int,
    ) -> None:
        batch = batch_of(product, tokens)
        kernel = self._kernels[product, weight.out_features, weight.in_features, batch]
        tensors = (weight.codes, weight.absmax, self._pairs, x, order, starts, topk_weights, out)
        kernel.launch(*tensors, weight.num_matrices, weight.out_features, tokens)
