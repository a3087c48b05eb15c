"""Random 4-bit products, with what they give in float32."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from serve_app.model.kernels.cuda.products import CudaProducts, TiledWeight
from serve_app.model.kernels.cuda.tiles import absmax_to_tiles, codes_to_tiles
from serve_app.model.kernels.cuda.variants import DENSE, DOWN, GATE_UP
from serve_app.model.quantize import code_values

K, NUM_EXPERTS, TOP_K = 2048, 4, 2
ROWS = {DENSE: 128, GATE_UP: 256, DOWN: 256}
"""N of each product: two jobs and more of every kernel."""
UNUSED = 1
"""An expert that gets no token."""
CODE = code_values("nf4")


@dataclass(frozen=True)
class Matrices:
    """A stack of matrices, in tiles and dequantized to float32 `[E, N, K]`."""

    tiled: TiledWeight
    floats: Tensor

    @classmethod
    def random(cls, count: int, rows: int) -> "Matrices":
        generator = torch.Generator().manual_seed(rows)
        packed = torch.randint(
            0, 256, (count, rows, K // 2), generator=generator, dtype=torch.uint8
        )
        absmax = (torch.rand(count, rows, K // 64, generator=generator) + 0.5).bfloat16()
        values, numbers = CODE.bfloat16().float(), packed.long()
        weights = torch.stack((values[numbers >> 4], values[numbers & 15]), dim=-1)
        scaled = weights.view(count, rows, -1, 64) * absmax.float()[..., None]
        tiled = TiledWeight(codes_to_tiles(packed), absmax_to_tiles(absmax))
        return cls(tiled, scaled.view(count, rows, K))


def routing(tokens: int, crowded: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`topk_ids` `[T, k]`, `order` and `starts`. The last of several tokens is padding, which goes
    to no expert; `crowded` sends every token to the last two experts."""
    usable = torch.tensor([e for e in range(NUM_EXPERTS) if e != UNUSED])
    generator = torch.Generator().manual_seed(tokens)
    chosen = torch.rand(tokens, len(usable), generator=generator).topk(TOP_K).indices
    ids = torch.tensor([2, 3]).repeat(tokens, 1) if crowded else usable[chosen]
    live = ids.flatten()[: TOP_K * max(1, tokens - 1)]
    order = torch.full((tokens * TOP_K,), -(10**6))
    order[: len(live)] = live.argsort(stable=True)
    starts = torch.tensor([int((live < e).sum()) for e in range(NUM_EXPERTS + 1)])
    return ids, order.int(), starts.int()


def activations(rows: int, last_block_only: bool) -> Tensor:
    """Returns bfloat16 `[rows, K]`; zero but for the last block of K where asked."""
    x = torch.randn(rows, K, generator=torch.Generator().manual_seed(rows))
    if last_block_only:
        x[:, :-64] = 0
    return x.bfloat16()


def error(
    products: CudaProducts,
    product: str,
    matrices: Matrices,
    tokens: int,
    *,
    crowded: bool = False,
    last_block_only: bool = False,
) -> float:
    """The relative error of a product beside float32, infinite where it wrote what it must not or
    did not write what it must."""
    if product == DENSE:
        x = activations(tokens, last_block_only)
        found = torch.full((tokens, matrices.tiled.out_features), float("nan"))
        products.dense(matrices.tiled, x, found)
        return relative(found, x.float() @ matrices.floats[0].T)
    ids, order, starts = routing(tokens, crowded)
    live = order[: int(starts[-1])].long()
    expert = ids.flatten()[live]
    if product == GATE_UP:
        x = activations(tokens, last_block_only)
        found = torch.full((tokens * TOP_K, ROWS[GATE_UP] // 2), float("nan")).bfloat16()
        products.gate_up(matrices.tiled, x, order, starts, found)
        both = torch.einsum("pk,pnk->pn", x[live // TOP_K].float(), matrices.floats[expert])
        gate, up = both.view(len(live), -1, 2, 8).unbind(2)
        expected = torch.full_like(found, float("nan"), dtype=torch.float32)
        expected[: len(live)] = (F.silu(gate) * up).flatten(1)
        return relative(found.float(), expected)
    x = activations(tokens * TOP_K, last_block_only)
    weights = torch.rand(tokens * TOP_K, generator=torch.Generator().manual_seed(1)) + 0.5
    found = torch.full((tokens * TOP_K, ROWS[DOWN]), float("nan"))
    products.down(matrices.tiled, x, order, starts, weights, TOP_K, found)
    sums = torch.einsum("pk,pnk->pn", x[: len(live)].float(), matrices.floats[expert])
    expected = torch.full_like(found, float("nan"))
    expected[live] = sums * weights[live, None]
    return relative(found, expected)


def relative(found: Tensor, expected: Tensor) -> float:
    """Returns the relative error; infinity unless both have NaN in the same places."""
    if not torch.equal(found.isnan(), expected.isnan()):
        return float("inf")
    return float((found - expected).nan_to_num().norm() / expected.nan_to_num().norm())
