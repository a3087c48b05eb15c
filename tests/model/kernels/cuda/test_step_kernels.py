"""The sources of the decode step's small kernels, run on the host, beside torch."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from serve_app.model.kernels.cuda.step_kernels import Routing
from serve_app.model.kernels.decode_batch import DecodeBatch
from serve_app.model.mixtral import Rope
from tests.model.kernels.cuda.emulator import has_compiler
from tests.model.kernels.cuda.step_bench import (
    BLOCK_SIZE,
    ROUNDING,
    TOP_K,
    Bench,
    E,
    H,
    config,
    edited_error,
    error,
    random,
)

pytestmark = pytest.mark.skipif(not has_compiler(), reason="g++ compiles the kernels for the host")


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench()


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x.float(), (H,), weight.float(), config().rms_norm_eps)


def embed_error(bench: Bench) -> float:
    embedding, weight = random(9, H), random(H, seed=1)
    ids = torch.tensor([8, 0, 3])
    x, y = random(3, H, seed=2), random(3, H, seed=3)
    with bench.late(0):
        bench.kernels.embed(ids, embedding, weight, x, y)
    if not torch.equal(x, embedding[ids]):
        return float("inf")
    return error(y, rms_norm(x, weight))


def norm_error(bench: Bench) -> float:
    """Returns the error for two summands a row; the second row is padding, with NaN as parts."""
    x, weight, lens = random(3, H), random(H, seed=1), torch.tensor([4, 0, 1]).int()
    parts = random(3 * TOP_K, H, seed=2).float()
    sums = x.float() + parts.view(3, TOP_K, H).sum(1)
    sums[1], parts[2:4] = x[1], float("nan")
    y = random(3, H, seed=3)
    with bench.late(3):
        bench.kernels.add_norm(x, parts, lens, weight, y)
    return max(error(x, sums), error(y, rms_norm(x, weight)))


def route_error(bench: Bench, rows: int, finished: Tensor | None = None) -> float:
    """Returns the error; infinity where torch chooses other experts from the same `y`."""
    x, weight, router = random(rows, H), random(H, seed=1), random(E, H, seed=2)
    parts = random(rows, H, seed=3).float()
    lens = torch.arange(1, rows + 1).int()
    lens[rows // 2 :: 5] = 0
    lens[0] = 1
    sums = torch.where((lens > 0)[:, None], x.float() + parts, x.float())
    finished = torch.zeros(1, dtype=torch.int32) if finished is None else finished
    routing, y = Routing.empty(rows, bench.config, finished), torch.empty_like(x)
    with bench.late(3):
        bench.kernels.add_norm_route(x, parts, lens, weight, router, y, routing)
    probabilities = F.linear(y, router).float().softmax(-1)
    weights, ids = probabilities.topk(TOP_K)
    live = (lens > 0)[:, None].expand(-1, TOP_K).flatten()
    ids = torch.where(live, ids.flatten(), E)
    order = ids.argsort(stable=True)[: int(live.sum())].int()
    starts = torch.tensor([int((ids < e).sum()) for e in range(E + 1)]).int()
    is_right = torch.equal(routing.order[: len(order)], order)
    is_right &= torch.equal(routing.starts, starts) and int(finished) == 0
    if not is_right:
        return float("inf")
    expected = (weights / weights.sum(-1, keepdim=True)).flatten()
    found = (routing.topk_weights[live], expected[live])
    return max(error(x, sums), error(y, rms_norm(x, weight)), error(*found))


def route_seven(bench: Bench) -> float:
    return route_error(bench, 7)


def rope_error(bench: Bench) -> float:
    """Returns the error for three rows, of which the second is padding."""
    shape = bench.config
    heads, kv_heads, size = 6, 2, shape.head_dim
    qkv = torch.randn(3, (heads + 2 * kv_heads) * size, generator=torch.Generator().manual_seed(0))
    rope = Rope(shape).to(torch.bfloat16)
    rope.fill()
    positions, slots = torch.tensor([5, 0, 900]), torch.tensor([33, 0, 2])
    lens = torch.tensor([6, 0, 901]).int()
    batch = DecodeBatch(slots, positions, slots, lens, torch.zeros(3, 1).int())
    queries = torch.full((3, heads, size), float("nan")).bfloat16()
    keys, values = torch.zeros(2, 4, BLOCK_SIZE, kv_heads, size).bfloat16()
    with bench.late(0):
        tables = (rope.cos, rope.sin)
        bench.kernels.rope(qkv, batch, tables, queries, keys, values)
    split = qkv.view(3, -1, size)
    turned = split * rope.cos[positions].float()
    turned += split.roll(size // 2, dims=-1) * rope.sin[positions].float()
    live, where = [0, 2], slots[[0, 2]]
    stored = torch.zeros(2, 4 * BLOCK_SIZE, kv_heads, size)
    stored[0, where] = turned[live, heads : heads + kv_heads]
    stored[1, where] = split[live, heads + kv_heads :]
    cache = torch.stack((keys, values)).flatten(1, 2)
    return max(error(queries[live], turned[live, :heads]), error(cache, stored))


def test_the_hidden_state_begins_as_rows_of_the_embedding(bench: Bench) -> None:
    """Bit for bit, and normalized."""
    assert embed_error(bench) < ROUNDING


def test_parts_are_added_and_normalized(bench: Bench) -> None:
    """Padding rows add nothing."""
    assert norm_error(bench) < ROUNDING


@pytest.mark.parametrize("rows", [1, 7, 70])
def test_tokens_are_sorted_by_expert(bench: Bench, rows: int) -> None:
    """Experts and order equal torch's, whichever block finishes last. Padding rows have no expert,
    and the counter is 0 after the launch."""
    finished = torch.zeros(1, dtype=torch.int32)
    for _ in range(2):
        assert route_error(bench, rows, finished) < ROUNDING
        bench.reverse()


def test_a_row_of_nan_disturbs_no_other(bench: Bench) -> None:
    """It gets NaN as weights and k different experts; others get what they get without it."""
    found = []
    for value in (1.0, float("nan")):
        x, router, weight = random(3, H), random(E, H, seed=1), random(H, seed=2)
        x[1, 7] = value
        finished = torch.zeros(1, dtype=torch.int32)
        routing, y = Routing.empty(3, bench.config, finished), torch.empty_like(x)
        parts, lens = torch.zeros(3, H), torch.ones(3).int()
        bench.kernels.add_norm_route(x, parts, lens, weight, router, y, routing)
        found.append(routing)
    sound, broken = found
    others = [0, 1, 4, 5]
    assert torch.equal(sound.topk_weights[others], broken.topk_weights[others])
    assert torch.equal(sound.topk_ids[others], broken.topk_ids[others])
    assert broken.topk_weights[2:4].isnan().all()
    assert len(set(broken.topk_ids[2:4].tolist())) == 2
    assert broken.order.sort().values.tolist() == list(range(6))


def test_queries_and_keys_are_rotated(bench: Bench) -> None:
    """Keys and values are written into the slots of rows that are no padding, and nowhere else."""
    assert rope_error(bench) < ROUNDING


EDITS: dict[str, tuple[Callable[[Bench], float], str, str, str]] = {
    "the part of a row": (norm_error, "add_norm.cu", "SUMMANDS + s) *", "SUMMANDS) *"),
    "the wait": (norm_error, "add_norm.cu", "  wait_for_previous();\n", ""),
    "the barrier of a sum": (norm_error, "add_norm.cu", " = mine;\n  __syncthreads();", " = mine;"),
    "the place of an entry": (route_seven, "routing.cuh", "(1u << lane)", "(2u << lane)"),
    "the last block": (route_seven, "add_norm.cu", "gridDim.x - 1", "gridDim.x - 2"),
    "the partner of an element": (rope_error, "rope.cu", "(d + HEAD_DIM / 2)", "(d + 4)"),
    "padding's key": (rope_error, "rope.cu", "else if (is_live)", "else"),
}
"""What is computed, in which source, what is replaced and by what."""


@pytest.mark.parametrize("case", EDITS.values(), ids=EDITS)
def test_a_changed_index_is_found(case: tuple[Callable[[Bench], float], str, str, str]) -> None:
    """A kernel with one index, barrier or condition changed does not pass."""
    compute, file, old, new = case
    assert not edited_error(compute, file, old, new) < 5 * ROUNDING
