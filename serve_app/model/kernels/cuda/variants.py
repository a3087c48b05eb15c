"""Which CUDA kernel a product uses, and how it is compiled for a card.

The more tokens an expert has, the more sums a thread holds. The choice has two parts:

1. The host chooses the kernel, by the size of the batch alone, so that a graph can be captured. The
   kernel's number of token tiles sets its registers and shared memory, and so how many blocks run
   at once: one kernel for all batches would take the second block from batches of a few tokens.
2. The device chooses a loop in the kernel for each expert, by the expert's number of tokens: one
   for a quarter, half, three quarters or all of the kernel's token tiles (`with_tiles`, tiles.cuh).
   An expert with more tokens takes more passes. Launching every kernel and leaving all but one at
   once would take six more launches a layer.

A token's sums are added in the same order in every loop of a kernel, so a token gets the same bits
in any batch that has the same kernel, whatever experts the other tokens have.

Each loop has no branch for a tile, so the matrix instructions of its tiles overlap. With such
branches, a loop of 8 tiles on an H200 took 4,992 cycles at least and 1,189 instructions where it
takes 2,195 and 907 now (computed from the machine code, `benchmarks/results/product-loops.json`).
"""

from dataclasses import dataclass, fields

ROW_SIZE, SUM_BYTES = 16, 512
"""Rows of a tile; bytes of a warp's sums of one tile and 8 tokens."""
DENSE, GATE_UP, DOWN = "dense", "gate_up", "down"
"""The products; see tiles.cuh."""
OUTPUTS = {DENSE: 0, GATE_UP: 1, DOWN: 2}


@dataclass(frozen=True)
class Card:
    """The properties of a GPU that the kernels depend on."""

    capability: int
    """90 is compute capability 9.0."""
    multiprocessors: int

    @property
    def overlaps_kernels(self) -> bool:
        """Whether a kernel can start before the previous one has ended."""
        return self.capability >= 90

    @property
    def has_large_memory(self) -> bool:
        """Whether a multiprocessor has at least 164 KB of shared memory: A100, H100, H200, B200."""
        return self.capability in (80, 90, 100)

    @property
    def shared_bytes(self) -> int:
        """Shared memory that a block may have."""
        return {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}.get(self.capability, 99 << 10)


CAPABILITIES = (80, 86, 89, 90, 100, 120)
"""The cards that the tests compile for."""


@dataclass(frozen=True)
class FewTokens:
    """few_tokens.cu; the fields are its macros."""

    row_tiles: int
    token_tiles: int
    warps: int = 8
    teams: int = 1
    blocks_per_sm: int = 2

    source = "few_tokens"

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps * self.teams

    @property
    def row_multiple(self) -> int:
        """N must be a multiple of this."""
        return ROW_SIZE * self.row_tiles

    @property
    def column_multiple(self) -> int:
        """K must be a multiple of this."""
        return 256 * self.warps

    @property
    def memory(self) -> int:
        """Bytes of shared memory besides the table."""
        buffers = 2 if self.token_tiles <= 2 else 1
        return buffers * self.teams * self.warps * self.row_tiles * self.token_tiles * SUM_BYTES


@dataclass(frozen=True)
class MoreTokens:
    """more_tokens.cu; the fields are its macros."""

    row_tiles: int
    token_tiles: int
    row_warps: int
    shares: int
    chunk: int
    stages: int
    scale_weights: int
    blocks_per_sm: int = 1

    source = "more_tokens"

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.row_warps * self.shares

    @property
    def row_multiple(self) -> int:
        """N must be a multiple of this."""
        return ROW_SIZE * self.row_tiles * self.row_warps

    @property
    def column_multiple(self) -> int:
        """K must be a multiple of this."""
        return 256 * self.shares

    @property
    def memory(self) -> int:
        """Bytes of shared memory besides the table."""
        stages = self.shares * self.stages * self.chunk * self.token_tiles * 8 * 64 * 2
        warps = self.shares * self.row_warps if self.shares > 1 else 0
        return stages + warps * self.row_tiles * self.token_tiles * SUM_BYTES


Variant = FewTokens | MoreTokens

TOKENS_OF_TILES = {DENSE: ((8, 1), (16, 2)), GATE_UP: ((16, 1), (32, 2), (64, 4))}
TOKENS_OF_TILES[DOWN] = TOKENS_OF_TILES[GATE_UP]
"""The most tokens of a batch for each number of token tiles. Of 16 tokens with 2 of 8 experts each,
the fullest expert has 7 on average; of 32 it has 12, of 64 it has 22."""
LARGEST_TILES = {DENSE: 4, GATE_UP: 8, DOWN: 8}
"""Token tiles of larger batches. A dense matrix that is read again comes from the L2 cache."""


def token_tiles_of(product: str, tokens: int) -> int:
    """Token tiles of the kernel for a batch of `tokens`."""
    found = (tiles for most, tiles in TOKENS_OF_TILES[product] if tokens <= most)
    return next(found, LARGEST_TILES[product])


def variants(product: str, card: Card) -> dict[int, Variant]:
    """The kernels of a product by their token tiles.

    Where shared memory is large they have the shapes that were fastest as prototypes on an H200.
    """
    is_large = card.capability in (90, 100)
    # Two blocks with a table of 64 KB each, or where they do not fit, two teams that share one.
    pair: dict[str, int] = {} if card.has_large_memory else {"teams": 2, "blocks_per_sm": 1}
    if product == DENSE:
        one, two = FewTokens(1, 1, **pair), FewTokens(1, 2, **pair)
        return {1: one, 2: two, 4: FewTokens(2, 4, blocks_per_sm=1)}
    blocks = 2 if is_large else 1
    made: dict[int, Variant] = {
        1: FewTokens(2, 1, **pair),
        2: MoreTokens(2, 2, 4, 2, 4, stages=2, scale_weights=0, blocks_per_sm=blocks),
        4: MoreTokens(2, 4, 4, 2, 2, stages=2, scale_weights=1),
        8: MoreTokens(2, 8, 8, 1, 4, stages=2, scale_weights=1),
    }
    if is_large and product == GATE_UP:
        made[4] = MoreTokens(4, 4, 4, 2, 4, stages=3, scale_weights=1)
    if is_large and product == DOWN:
        made[4] = MoreTokens(2, 4, 4, 2, 4, stages=3, scale_weights=1)
        made[8] = MoreTokens(2, 8, 4, 2, 2, stages=2, scale_weights=1)
    return made


def macros(variant: Variant, product: str, card: Card, in_features: int, top_k: int) -> list[str]:
    """The macros that a variant is compiled with, `NAME=value`."""
    values = {field.name.upper(): getattr(variant, field.name) for field in fields(variant)}
    values |= {"OUTPUT": OUTPUTS[product], "K_BLOCKS": in_features // 64, "TOP_K": top_k}
    values["TABLE_STRIDE"] = table_stride(variant, card)
    return [f"{name}={value}" for name, value in values.items()]


def table_stride(variant: Variant, card: Card) -> int:
    """Words of the table for each byte: 64 takes 64 KB and fewer instructions, 32 takes 32 KB."""
    return 64 if 1024 * 64 + variant.memory <= card.shared_bytes else 32


def shared_bytes(variant: Variant, card: Card) -> int:
    """Bytes of shared memory of a block."""
    return 1024 * table_stride(variant, card) + variant.memory


def misfit(product: str, card: Card, out_features: int, in_features: int) -> str | None:
    """Returns the reason why a matrix `[out_features, in_features]` does not fit the kernels, or
    None if it does."""
    rows = max(each.row_multiple for each in variants(product, card).values())
    columns = max(each.column_multiple for each in variants(product, card).values())
    if out_features % rows or in_features % columns:
        return (
            f"{product} has {out_features} rows and {in_features} columns, and the kernels need "
            f"multiples of {rows} and {columns}"
        )
    return None
