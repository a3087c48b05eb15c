"""The sources of the CUDA kernels, run on the host, beside plain float32."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import Tensor

from serve_app.model.kernels.cuda.launcher import Grid
from serve_app.model.kernels.cuda.products import CudaProducts
from serve_app.model.kernels.cuda.variants import DENSE, DOWN, GATE_UP, Card
from tests.model.kernels.cuda.cases import CODE, NUM_EXPERTS, ROWS, TOP_K, K, Matrices, error
from tests.model.kernels.cuda.emulator import Edit, HostKernel, has_compiler

pytestmark = pytest.mark.skipif(not has_compiler(), reason="g++ compiles the kernels for the host")

CARDS = {"H200": Card(90, 1), "RTX 5090": Card(120, 1)}
"""One has the tables and shapes for much shared memory, the other those for little."""
TOKENS = (1, 7, 15, 21, 37, 67)
"""A batch for every number of token tiles, all odd."""
Make = Callable[..., CudaProducts]


class _Later:
    """A kernel that is compiled in another thread, or when it is launched."""

    def __init__(self, compile_it: Callable[[], HostKernel]) -> None:
        self._compile = compile_it
        self.late: tuple[int, ...] = ()
        self.seed = 0

    def launch(self, *arguments: Tensor | int | None, blocks: int | None = None) -> None:
        kernel = self._compile()
        kernel.late, kernel.seed = self.late, self.seed
        kernel.launch(*arguments, blocks=blocks)


@pytest.fixture(scope="module")
def make() -> Iterator[Make]:
    """Makes products of kernels for the host, from edited sources where asked; equal ones once."""
    with ThreadPoolExecutor(2) as pool:
        made: dict[tuple[object, ...], _Later] = {}

        def kernel(edit: Edit | None, name: str, macros: Sequence[str], grid: Grid) -> _Later:
            key = (edit, name, *macros, grid)
            if key not in made:
                compile_it = partial(HostKernel, name, macros, grid, edit)
                made[key] = _Later(compile_it if edit else pool.submit(compile_it).result)
            return made[key]

        def products(
            card: Card,
            edit: Edit | None = None,
            only: str | None = None,
            dense_rows: int = ROWS[DENSE],
        ) -> CudaProducts:
            rows = {**ROWS, DENSE: dense_rows}
            sizes = {each: {(rows[each], K)} for each in rows if only in (None, each)}
            return CudaProducts(
                card,
                CODE,
                sizes,
                TOP_K,
                lambda name, macros, grid: kernel(edit, name, macros, grid),
            )

        yield products


@pytest.fixture(scope="module")
def matrices() -> dict[str, Matrices]:
    return {
        product: Matrices.random(1 if product == DENSE else NUM_EXPERTS, rows)
        for product, rows in ROWS.items()
    }


def tolerance(product: str, tokens: int) -> float:
    """Allows bfloat16's rounding where gate_up stores it, or where weights are scaled in it."""
    return 3e-3 if product == GATE_UP or tokens > 32 else 2e-6


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("product", ROWS)
@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_a_product_equals_float32(
    make: Make, matrices: dict[str, Matrices], card: Card, product: str, tokens: int
) -> None:
    """Products equal float32, also with a token without an expert, an expert without tokens, and an
    input that is 0 except in the last block of K."""
    products = make(card)
    for last_block_only in (False, True):
        found = error(products, product, matrices[product], tokens, last_block_only=last_block_only)
        assert found < tolerance(product, tokens)


@pytest.mark.parametrize("tokens", [15, 21, 37, 67])
def test_blocks_of_48_rows_and_more(make: Make, tokens: int) -> None:
    """The kernels for a number of rows that is a multiple of 384, as Mixtral's qkv, equal
    float32."""
    products = make(CARDS["H200"], only=DENSE, dense_rows=384)
    assert error(products, DENSE, Matrices.random(1, 384), tokens) < tolerance(DENSE, tokens)


@pytest.mark.parametrize("product", [GATE_UP, DOWN])
def test_an_expert_may_have_more_tokens_than_a_pass(
    make: Make, matrices: dict[str, Matrices], product: str
) -> None:
    """16 tokens that all go to the same experts take two passes of 8."""
    found = error(make(CARDS["H200"]), product, matrices[product], 16, crowded=True)
    assert found < tolerance(product, 16)


def test_the_largest_kernel_equals_float32(make: Make, matrices: dict[str, Matrices]) -> None:
    """16 token tiles: one expert has more than 128 tokens, the others have fewer."""
    found = error(make(CARDS["H200"], only=GATE_UP), GATE_UP, matrices[GATE_UP], 193)
    assert found < tolerance(GATE_UP, 193)


@pytest.mark.parametrize("tokens", [5, 21, 37])
@pytest.mark.parametrize("product", [DENSE, DOWN])
@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_threads_may_run_in_any_order(
    make: Make, matrices: dict[str, Matrices], card: Card, product: str, tokens: int
) -> None:
    """Barriers make up for the order of blocks and threads, which is random here."""
    kernels = make(card)._kernels.values()
    try:
        for kernel in kernels:
            kernel.seed = tokens  # type: ignore[attr-defined]
        assert error(make(card), product, matrices[product], tokens) < tolerance(product, tokens)
    finally:
        for kernel in kernels:
            kernel.seed = 0  # type: ignore[attr-defined]


def test_a_token_has_the_same_bits_in_any_batch(make: Make, matrices: dict[str, Matrices]) -> None:
    """The batches have the same kernel; what else they hold changes nothing."""
    products, weight = make(CARDS["H200"]), matrices[DENSE].tiled
    x = torch.randn(40, K, generator=torch.Generator().manual_seed(0)).bfloat16()
    for whole, alone in ((slice(0, 8), slice(5, 6)), (slice(0, 40), slice(4, 40))):
        first = torch.empty(len(x[whole]), ROWS[DENSE])
        second = torch.empty(len(x[alone]), ROWS[DENSE])
        products.dense(weight, x[whole], first)
        products.dense(weight, x[alone], second)
        assert torch.equal(first[alone], second)


def test_bits_do_not_depend_on_the_tokens_of_an_expert(
    make: Make, matrices: dict[str, Matrices]
) -> None:
    """Tokens whose expert has 36 tokens, and so a loop of four tiles, get the same bits as alone in
    a loop of one."""
    products, tokens = make(CARDS["H200"], only=DOWN), 37
    x = torch.randn(tokens * TOP_K, K, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = []
    for count in (36, 6):
        order = torch.full((tokens * TOP_K,), -(10**6), dtype=torch.int32)
        order[:count] = TOP_K * torch.arange(count)
        starts = torch.tensor([0, 0, 0, count, count]).int()
        out = torch.empty(tokens * TOP_K, ROWS[DOWN])
        weights = torch.ones(tokens * TOP_K)
        products.down(matrices[DOWN].tiled, x, order, starts, weights, TOP_K, out)
        found.append(out[: 6 * TOP_K : TOP_K])
    assert torch.equal(*found)


def test_matrices_are_dequantized(make: Make, matrices: dict[str, Matrices]) -> None:
    """Some of a stack, in any order, to the nearest bfloat16; by one block and by two."""
    chosen = torch.tensor([3, 0])
    stack = matrices[DOWN]
    for multiprocessors in (1, 4):
        products = make(Card(90, multiprocessors), only="unpack")
        found = products.unpack(stack.tiled, chosen)
        assert torch.equal(found, stack.floats[chosen].bfloat16())


LATE = {DENSE: (3,), GATE_UP: (3, 4, 5), DOWN: (3,)}
"""The arguments that the kernel before a product writes: x, and for gate_up the routing. `down` may
rely on the routing before it waits."""


@pytest.mark.parametrize("tokens", [5, 21])
@pytest.mark.parametrize("product", LATE)
def test_a_product_waits_for_the_kernel_before(
    make: Make, matrices: dict[str, Matrices], product: str, tokens: int
) -> None:
    """A product reads the previous kernel's results only after the wait, and writes nothing before
    it."""
    products = make(CARDS["H200"])
    try:
        for kernel in products._kernels.values():
            kernel.late = LATE[product]  # type: ignore[attr-defined]
        assert error(products, product, matrices[product], tokens) < tolerance(product, tokens)
    finally:
        for kernel in products._kernels.values():
            kernel.late = ()  # type: ignore[attr-defined]


EDITS = {
    "the byte of a fragment": (
        DENSE,
        5,
        "tiles.cuh",
        "upper, 2 * (i % 2) + 1",
        "upper, 2 * (i % 2)",
    ),
    "the half of the columns": (
        DENSE,
        5,
        "tiles.cuh",
        "lower = i / 2 ? codes.w : codes.z",
        "lower = codes.z",
    ),
    "the row of a scale": (
        DENSE,
        5,
        "tiles.cuh",
        "return bits_to_float(pair << 16)",
        "return bits_to_float(pair & 0xFFFF0000u)",
    ),
    "the lane's column": (DENSE, 5, "few_tokens.cu", "SHARE) * 64 + t * 8", "SHARE) * 64 + t * 4"),
    "the token of a lane": (DENSE, 5, "few_tokens.cu", "? n * 8 + g :", "? n * 8 + t :"),
    "the sum of a warp": (DENSE, 5, "few_tokens.cu", "w < WARPS;", "w < WARPS - 1;"),
    "the scale of a step": (DENSE, 5, "few_tokens.cu", "four + step % 2", "four"),
    "the barrier before the sums": (
        DENSE,
        5,
        "few_tokens.cu",
        "team_barrier(team);\n    for",
        "for",
    ),
    "the entry of a place": (DOWN, 5, "tiles.cuh", "p.order[place] : place", "place : place"),
    "the end of an expert": (DOWN, 5, "tiles.cuh", "starts[expert + 1];", "starts[expert] + 1;"),
    "the swapped half": (
        GATE_UP,
        21,
        "more_tokens.cu",
        "position_of(g, t + 4 * half)",
        "position_of(g + half, t + 4 * half)",
    ),
    "the copied block": (GATE_UP, 21, "more_tokens.cu", "first_block + block)", "first_block)"),
    "the wait for copies": (GATE_UP, 21, "more_tokens.cu", "wait_for_copies<STAGES - 2>();", ""),
    "the next job's chunks": (
        GATE_UP,
        21,
        "more_tokens.cu",
        "in_next_job = chunk >= CHUNKS",
        "in_next_job = false",
    ),
    "the wait for the kernel before": (
        DENSE,
        5,
        "few_tokens.cu",
        "lane);\n    wait_for_previous();\n  }\n  __sync",
        "lane);\n  }\n  __sync",
    ),
    "the share of a warp": (GATE_UP, 21, "more_tokens.cu", "s < SHARES;", "s < 1;"),
    "the tiles of an expert": (GATE_UP, 21, "tiles.cuh", "if (needed > N)", "if (needed > N + 1)"),
}
"""Product, tokens, and in which source what is replaced."""


@pytest.mark.parametrize("case", EDITS.values(), ids=EDITS)
def test_a_changed_index_is_found(
    make: Make, matrices: dict[str, Matrices], case: tuple[str, int, str, str, str]
) -> None:
    """A kernel with one index or barrier changed does not pass."""
    product, tokens, file, old, new = case

    def edit(name: str, text: str) -> str:
        assert name != file or text.count(old) == 1
        return text.replace(old, new) if name == file else text

    products = make(CARDS["H200"], edit, product)
    try:
        found = error(products, product, matrices[product], tokens)
    except RuntimeError:
        return
    assert not found < 10 * tolerance(product, tokens)
