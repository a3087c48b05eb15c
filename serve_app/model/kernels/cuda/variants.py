"""Chooses the CUDA kernel of a product, and the kernel's compile-time sizes for a card.

A kernel computes up to `token_tiles` * 8 tokens of an expert at once. More tokens need more sums
per thread. The choice has two parts:

1. The host chooses the kernel only by the size of the batch (`BATCHES`), so that a graph can be
   captured. The number of token tiles determines the registers and the shared memory of a block,
   and therefore the number of blocks that run at once. With one kernel for all batches, a
   multiprocessor would run one block instead of two even for batches of a few tokens.
2. The device chooses a loop in the kernel for each expert by the expert's number of tokens: for a
   quarter, half, three quarters or all of the kernel's token tiles (`with_tiles`, tiles.cuh). An
   expert with more tokens than the kernel's tiles needs more passes. The alternative, to launch
   every kernel and let all but one end at once, would take six more launches per layer.

Example: a batch of 20 tokens uses the kernel with 2 token tiles (16 tokens) for gate_up. An expert
with 5 tokens needs one pass of the loop for half of the tiles, an expert with 16 tokens one pass of
the loop for all tiles, and an expert with 18 tokens two passes.

Every loop of a kernel adds a token's sums in the same order, so a token gets the same bits in any
batch with the same kernel, for any experts of the other tokens.

The number of tiles of a loop is a compile-time constant, so the loop has no branches, and the
matrix instructions of its tiles overlap. With branches, a loop of 8 tiles on an H200 took at least
4,992 cycles and 1,189 instructions; it now takes 2,195 and 907 (computed from the machine code,
`benchmarks/results/product-loops.json`).
"""

from dataclasses import dataclass, fields

ROW_SIZE, SUM_BYTES = 16, 512
"""Number of rows of a tile, and bytes of a warp's sums for one tile and 8 tokens."""
DENSE, GATE_UP, DOWN = "dense", "gate_up", "down"
"""The products; see tiles.cuh."""
OUTPUTS = {DENSE: 0, GATE_UP: 1, DOWN: 2}


@dataclass(frozen=True)
class Card:
    """The properties of a GPU that the kernels depend on."""

    capability: int
    """The compute capability: 90 for 9.0."""
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
        """Maximum bytes of shared memory of a block."""
        return {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}.get(self.capability, 99 << 10)


CAPABILITIES = (80, 86, 89, 90, 100, 120)
"""The compute capabilities that the tests compile for."""


@dataclass(frozen=True)
class FewTokens:
    """The sizes with which few_tokens.cu is compiled; the fields are its macros."""

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
    """The sizes with which more_tokens.cu is compiled; the fields are its macros."""

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

LARGE = 1 << 30
"""Maximum number of tokens of a large batch: unlimited."""
BATCHES = {DENSE: (8, 16, 32, 64, 128, LARGE), GATE_UP: (16, 32, 64, 192, LARGE)}
BATCHES[DOWN] = BATCHES[GATE_UP]
"""Maximum numbers of tokens of the batches that have a kernel each. If each token uses 2 of 8
experts, the busiest expert gets 7 of 16 tokens on average, 12 of 32, and 22 of 64."""


def batch_of(product: str, tokens: int) -> int:
    """Returns the entry of `BATCHES` for a batch of `tokens` tokens."""
    return next(most for most in BATCHES[product] if tokens <= most)


def variants(product: str, card: Card, out_features: int) -> dict[int, Variant]:
    """Returns the kernels of a product with matrices of `out_features` rows, by `BATCHES`.

    For compute capability 9.0, these are the kernels that were fastest on an H200. There `gate_up`
    for 512 tokens took 899 us with 16 tiles and 1,067 us with 8. `down` gained nothing, because it
    has half as many jobs as multiprocessors. qkv and o of a layer took 150 us with 8 tiles and 293
    us with 4.
    """
    is_large = card.capability in (90, 100)
    # Two blocks with a table of 64 KB each; if they do not fit, one block with two teams.
    pair: dict[str, int] = {} if card.has_large_memory else {"teams": 2, "blocks_per_sm": 1}
    if product == DENSE:
        few, more = FewTokens(1, 1, **pair), FewTokens(1, 2, **pair)
        rest: Variant = FewTokens(2, 4, blocks_per_sm=1)
        dense = {8: few, 16: more, 32: rest, 64: rest, 128: rest, LARGE: rest}
        if is_large and out_features % 128 == 0:
            wide = MoreTokens(2, 8, 4, 2, 2, stages=2, scale_weights=1)
            dense |= {128: wide, LARGE: wide}
        return dense | (_dense_of_hopper(out_features) if card.capability == 90 else {})
    blocks = 2 if is_large else 1
    kernels: dict[int, Variant] = {
        16: FewTokens(2, 1, **pair),
        32: MoreTokens(2, 2, 4, 2, 4, stages=2, scale_weights=0, blocks_per_sm=blocks),
        64: MoreTokens(2, 4, 4, 2, 2, stages=2, scale_weights=1),
        192: MoreTokens(2, 8, 8, 1, 4, stages=2, scale_weights=1),
    }
    if is_large and product == GATE_UP:
        kernels[32] = MoreTokens(4, 2, 4, 2, 2, stages=3, scale_weights=0)
        kernels[64] = MoreTokens(4, 4, 4, 2, 2, stages=2, scale_weights=1)
    if card.capability == 90 and product == GATE_UP:  # on 10.0 it would spill registers
        kernels[LARGE] = MoreTokens(2, 16, 8, 1, 2, stages=3, scale_weights=1)
    if is_large and product == DOWN:
        kernels[64] = MoreTokens(2, 4, 4, 2, 4, stages=3, scale_weights=1)
        kernels[192] = MoreTokens(2, 8, 4, 2, 2, stages=2, scale_weights=1)
    return {LARGE: kernels[192], **kernels}


def _dense_of_hopper(out_features: int) -> dict[int, Variant]:
    """Returns the kernels of a dense matrix for 9 to 128 tokens that were fastest on an H200.

    Each block reads the activations of all its tokens from the L2 cache, so fewer blocks read less.
    Fastest is one job for nearly each of the 132 multiprocessors: with 48 rows per job, Mixtral's
    6,144 rows of qkv are 128 jobs; with 32, the 4,096 rows of the output projection are 128 jobs.
    """
    if out_features % 384 == 0:
        return {
            16: FewTokens(3, 2, blocks_per_sm=1),
            32: FewTokens(3, 4, blocks_per_sm=1),
            64: MoreTokens(2, 4, 3, 4, 2, stages=2, scale_weights=1),
        }
    if out_features % 64 == 0:
        return {
            16: FewTokens(2, 2, blocks_per_sm=1),
            64: MoreTokens(4, 4, 1, 8, 2, stages=2, scale_weights=1),
            128: MoreTokens(2, 8, 2, 4, 2, stages=2, scale_weights=1),
        }
    return {}


def macros(variant: Variant, product: str, card: Card, in_features: int, top_k: int) -> list[str]:
    """Returns the macros for the compilation of a variant, such as "TOKEN_TILES=2"."""
    values = {field.name.upper(): getattr(variant, field.name) for field in fields(variant)}
    values |= {"OUTPUT": OUTPUTS[product], "K_BLOCKS": in_features // 64, "TOP_K": top_k}
    values["TABLE_STRIDE"] = table_stride(variant, card)
    return [f"{name}={value}" for name, value in values.items()]


def table_stride(variant: Variant, card: Card) -> int:
    """Returns the number of words in the kernel's table for each value of a byte.

    64 words need fewer instructions and 64 KB of shared memory; 32 words need 32 KB.
    """
    return 64 if 1024 * 64 + variant.memory <= card.shared_bytes else 32


def shared_bytes(variant: Variant, card: Card) -> int:
    """Returns the bytes of shared memory of a block."""
    return 1024 * table_stride(variant, card) + variant.memory


def shape_problem(product: str, card: Card, out_features: int, in_features: int) -> str | None:
    """Returns the reason why a matrix `[out_features, in_features]` does not fit the kernels, or
    None if it does."""
    kernels = variants(product, card, out_features).values()
    rows = max(variant.row_multiple for variant in kernels)
    columns = max(variant.column_multiple for variant in kernels)
    if out_features % rows or in_features % columns:
        return (
            f"{product} has {out_features} rows and {in_features} columns, and the kernels need "
            f"multiples of {rows} and {columns}"
        )
    return None
