# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Products of many tokens with the float weights of several experts on a GPU, in Triton.

A launch computes `gate_up` or `down` for the tokens of all its experts. `gate_up` reads the rows of
x in the order of experts (`route_prompts`), and `down` writes its rows in the order of tokens, so
no tokens are copied in between.

The host knows the number of tokens, but not their experts. So n programs are launched, and program
i computes the tiles i, i + n, i + 2n, ...; the device computes the number of tiles from `starts`.
Example: 4,096 tokens with 2 of 8 experts each have 8,192 rows. If experts 0, 1, ... have 1,024,
700, ... rows, their tiles of 128 rows are 0 to 7, 8 to 13, ..., each times the tiles of columns.

The kernels compile for compute capabilities 8.0, 9.0 and 12.0, and ran on an H200 (9.0). There the
copy engine reads the weights, by a tensor descriptor: for 4,096 tokens of Mixtral 8x7B both
products of a layer took 4.30 ms, and 4.82 ms with addresses that the threads compute. Four stages,
a descriptor of the tokens too, and other tiles were slower.

Letters: T tokens, k experts per token, E experts, e experts of this launch, H hidden_size,
I intermediate_size.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

INTERLEAVED_ROWS = tl.constexpr(8)
"""See `quantized_weight.INTERLEAVED_ROWS`."""
SLACK = 1.5
"""Number of programs of a launch per tile, if all experts had the same number of tokens. Programs
without a tile end at once; if there are more tiles than programs, some programs compute two."""


@dataclass(frozen=True)
class TileShape:
    """The size of a program's tile, and the options of the launch."""

    rows: int
    columns: int
    depth: int
    """Number of columns of x and of the weights per iteration; it must divide K."""
    num_stages: int
    num_warps: int = 8
    by_descriptor: bool = False
    """Whether the weights are read by a tensor descriptor."""


WIDE = TileShape(128, 256, 64, num_stages=3, by_descriptor=True)
NARROW = TileShape(128, 128, 64, num_stages=4)
"""Tile sizes for compute capabilities 9 and 10, and for the others. They need 144 and 96 KB of
shared memory."""


def shape_of(device: torch.device) -> TileShape:
    """Returns the tile shape for `device`."""
    is_wide = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)
    return WIDE if is_wide else NARROW


@dataclass
class Routing:
    """The result of `route_prompts`: the order of a batch's tokens by expert."""

    order: Tensor
    starts: Tensor
    topk_weights: Tensor
    top_k: int


def gate_up(
    x: Tensor, weights: Tensor, routing: Routing, first: int, out: Tensor, shape: TileShape
) -> None:
    """Fills rows of `out` `[T * k, I]` with silu(gate) * up of `x` `[T, H]`.

    `weights` `[e, 2 * I, H]` are those of experts `first` to `first + e` (exclusive), with 8 rows
    of gate, 8 of up, and so on. Row 0 of `out` is the first entry of expert `first`. Rows after
    those of the last expert are not written. `out` needs at most `min(e, k) * T` rows.
    """
    _launch(x, weights, routing, first, out, shape, is_gate_up=True)


def down(
    x: Tensor, weights: Tensor, routing: Routing, first: int, out: Tensor, shape: TileShape
) -> None:
    """Fills the rows of these experts' entries in `out` `[T * k, H]`.

    `x` is the output of `gate_up`, and `weights` is `[e, H, I]`. Each row is multiplied by its
    entry's topk_weight.
    """
    _launch(x, weights, routing, first, out, shape, is_gate_up=False)


def _launch(
    x: Tensor,
    weights: Tensor,
    routing: Routing,
    first: int,
    out: Tensor,
    shape: TileShape,
    *,
    is_gate_up: bool,
) -> None:
    num_experts, out_features, in_features = weights.shape
    share = len(routing.order) * num_experts / (len(routing.starts) - 1)
    row_tiles = int(SLACK * share / shape.rows) + num_experts
    programs = row_tiles * triton.cdiv(out_features, shape.columns)
    by_descriptor = shape.by_descriptor
    lines: Any = weights
    if by_descriptor:
        lines = TensorDescriptor.from_tensor(weights.flatten(0, 1), [shape.columns, shape.depth])
    _grouped_product[(programs,)](
        *(x, lines, routing.order, routing.starts, routing.topk_weights, out, first, programs),
        IS_GATE_UP=is_gate_up,
        BY_DESCRIPTOR=by_descriptor,
        **dict(EXPERTS=num_experts, WIDTH=triton.next_power_of_2(num_experts)),
        **dict(N=out_features, K=in_features, TOP_K=routing.top_k),
        **dict(ROWS=shape.rows, COLUMNS=shape.columns, DEPTH=shape.depth),
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
    )


@triton.jit
def _tiles(starts, first, EXPERTS: tl.constexpr, WIDTH: tl.constexpr, N_TILES: tl.constexpr, ROWS):
    """Returns the first row, the end of the rows, and the end of the tiles of each expert of the
    launch, int32 `[WIDTH]` each."""
    e = tl.arange(0, WIDTH)
    begin = tl.load(starts + first + e, mask=e < EXPERTS, other=0)
    end = tl.load(starts + first + 1 + e, mask=e < EXPERTS, other=0)
    return begin, end, tl.cumsum(tl.cdiv(end - begin, ROWS) * N_TILES, 0)


@triton.jit
def _place(tile, begin, end, tile_ends, ROWS: tl.constexpr, N_TILES: tl.constexpr):
    """Returns a tile's expert, its rows `[ROWS]`, the end of the expert's rows, and the index of
    the tile's columns."""
    expert = tl.sum((tile_ends <= tile).to(tl.int32), 0)
    is_it = tl.arange(0, begin.shape[0]) == expert
    first_row = tl.sum(tl.where(is_it, begin, 0), 0)
    last_row = tl.sum(tl.where(is_it, end, 0), 0)
    row_tiles = tl.cdiv(last_row - first_row, ROWS)
    local = tile - tl.sum(tl.where(is_it, tile_ends, 0), 0) + row_tiles * N_TILES
    # Adjacent tiles have the same weights, so only the first tile reads them from memory and the
    # others from the L2 cache.
    rows = first_row + local % row_tiles * ROWS + tl.arange(0, ROWS)
    return expert, rows, last_row, local // row_tiles


@triton.jit
def _product(
    x,
    lines,
    is_row,
    weights,
    expert,
    number,
    BY_DESCRIPTOR: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Returns x[lines] @ weights[expert][column].T, float32 `[ROWS, COLUMNS]`, for the columns of
    tile `number`. Columns after the last one have any value."""
    depth = tl.arange(0, DEPTH)
    at = x + lines.to(tl.int64)[:, None] * K + depth[None, :]
    if not BY_DESCRIPTOR:
        column = number * COLUMNS + tl.arange(0, COLUMNS)
        weight_rows = expert.to(tl.int64) * N + (column % N)
        weight_at = weights + weight_rows[None, :] * K + depth[:, None]
    result = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, K, DEPTH):
        values = tl.load(at + start, mask=is_row[:, None], other=0.0)
        if BY_DESCRIPTOR:
            some = weights.load([expert * N + number * COLUMNS, start]).T
        else:
            some = tl.load(weight_at + start)
        result = tl.dot(values, some, result, input_precision="ieee")
    return result


@triton.jit
def _store_gate_up(sums, out, rows, is_row, number, N: tl.constexpr):
    """Stores silu(gate) * up at `rows` `[ROWS]` of `out` `[T * k, N / 2]`.

    `sums` `[ROWS, COLUMNS]`, of column tile `number`, has 8 columns of gate, 8 of up, and so on.
    """
    ROWS: tl.constexpr = sums.shape[0]
    HALF: tl.constexpr = sums.shape[1] // 2
    turns = tl.reshape(sums, [ROWS, HALF // INTERLEAVED_ROWS, 2, INTERLEAVED_ROWS])
    gate, up = tl.split(tl.permute(turns, [0, 1, 3, 2]))
    inner = tl.reshape(gate / (1.0 + tl.exp(-gate)) * up, [ROWS, HALF])
    column = number * HALF + tl.arange(0, HALF)
    where = out + rows.to(tl.int64)[:, None] * (N // 2) + column[None, :]
    is_there = is_row[:, None] & (column < N // 2)[None, :]
    tl.store(where, inner.to(out.dtype.element_ty), mask=is_there)


@triton.jit
def _store_down(sums, out, entry, is_row, topk_weights, column, N: tl.constexpr):
    """Stores `sums` `[ROWS, COLUMNS]` times the topk_weights of `entry` `[ROWS]` at these entries
    of `out` `[T * k, N]`."""
    sums *= tl.load(topk_weights + entry, mask=is_row, other=0.0)[:, None]
    where = out + entry.to(tl.int64)[:, None] * N + column[None, :]
    is_there = is_row[:, None] & (column < N)[None, :]
    tl.store(where, sums.to(out.dtype.element_ty), mask=is_there)


@triton.jit(do_not_specialize=["first", "programs"])
def _grouped_product(
    x,
    weights,
    order,
    starts,
    topk_weights,
    out,
    first,
    programs,
    IS_GATE_UP: tl.constexpr,
    BY_DESCRIPTOR: tl.constexpr,
    EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Computes the tiles of one program: of `gate_up` with `IS_GATE_UP`, otherwise of `down`.

    `weights` are an address or, with `BY_DESCRIPTOR`, a descriptor of the rows of all experts.
    """
    N_TILES: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    begin, end, tile_ends = _tiles(starts, first, EXPERTS, WIDTH, N_TILES, ROWS)
    first_row = tl.load(starts + first)
    for tile in range(tl.program_id(0), tl.max(tile_ends, 0), programs):
        expert, rows, last_row, number = _place(tile, begin, end, tile_ends, ROWS, N_TILES)
        is_row = rows < last_row
        entry = tl.load(order + rows, mask=is_row, other=0)
        lines = entry // TOP_K if IS_GATE_UP else rows - first_row
        sums = _product(
            *(x, lines, is_row, weights, expert, number, BY_DESCRIPTOR),
            *(N, K, ROWS, COLUMNS, DEPTH),
        )
        if IS_GATE_UP:
            _store_gate_up(sums, out, rows - first_row, is_row, number, N)
        else:
            column = number * COLUMNS + tl.arange(0, COLUMNS)
            _store_down(sums, out, entry, is_row, topk_weights, column, N)
