"""The source of decode attention, run on the host, beside float32."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from serve_app.model.kernels import kernel_check
from serve_app.model.kernels.cuda import step_kernels
from serve_app.model.kernels.cuda.step_kernels import AttentionMemory, StepKernels
from serve_app.model.kernels.cuda.use_kernels import step_attention_error
from serve_app.model.kernels.cuda.variants import Card
from serve_app.model.kernels.decode_batch import DecodeBatch
from tests.model.kernels.cuda.emulator import has_compiler
from tests.model.kernels.cuda.host_kernels import HostKernels
from tests.model.kernels.cuda.step_bench import (
    BLOCK_SIZE,
    ROUNDING,
    Bench,
    edited_error,
    error,
    random,
)

pytestmark = pytest.mark.skipif(not has_compiler(), reason="g++ compiles the kernels for the host")

CONTEXTS = [1, 0, 17, 64, 65, 150, 530]
"""One token, padding, a block, a split, one more, several splits, and splits of two tiles."""
WIDE: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 128}
"""Eight query heads of Mixtral's size share a KV head."""


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three programs take the splits of a row and KV head by turns."""
    monkeypatch.setattr(step_kernels, "NUM_PROGRAMS", 3 * 2 * len(CONTEXTS))
    monkeypatch.setattr(step_kernels, "MIN_PROGRAMS", 1)


class Decode:
    """A batch of decodes with random keys and values; the kernel before writes the new tokens."""

    def __init__(self, bench: Bench, contexts: list[int]) -> None:
        shape, width = bench.config, -(-max(CONTEXTS) // BLOCK_SIZE)
        count = len(CONTEXTS) * width
        heads = (shape.num_key_value_heads, shape.head_dim)
        self.keys, self.values = (random(count, BLOCK_SIZE, *heads, seed=i) for i in range(2))
        queries = random(len(CONTEXTS), shape.num_attention_heads, shape.head_dim, seed=2)
        tables = torch.randperm(count, generator=torch.Generator().manual_seed(3)).int()
        rows = [CONTEXTS.index(each) for each in contexts]
        self.queries = queries[rows].contiguous()
        self.tables = tables.view(len(CONTEXTS), width)[rows].contiguous()
        lens = torch.tensor(contexts).int()
        self.batch = DecodeBatch(lens, lens, lens, lens, self.tables)
        self.memory = AttentionMemory(shape, len(rows), torch.device("cpu"))

    def slots(self, row: int) -> Tensor:
        """Returns the slots of a row's context."""
        places = torch.arange(int(self.batch.context_lens[row]))
        return self.tables[row, places // BLOCK_SIZE] * BLOCK_SIZE + places % BLOCK_SIZE

    def new_tokens(self) -> tuple[Tensor, ...]:
        """Returns the keys and values of the new tokens."""
        last = [self.slots(row)[-1] for row, n in enumerate(self.batch.context_lens) if n > 0]
        return tuple(each.flatten(0, 1)[slot] for slot in last for each in (self.keys, self.values))

    def attended(self, bench: Bench) -> Tensor:
        """Returns what the kernel gives, `[rows, heads * head_dim]`."""
        out = torch.full_like(self.queries.flatten(1), float("nan"))
        with bench.late(0, parts=self.new_tokens()):
            bench.kernels.attention(
                self.queries, self.keys, self.values, self.batch, self.memory, out
            )
        return out

    def expected(self, bench: Bench) -> Tensor:
        """Returns attention in float32, by torch."""
        shape, rows = bench.config, []
        group = shape.num_attention_heads // shape.num_key_value_heads
        for row, queries in enumerate(self.queries.float()):
            slots = self.slots(row)[-(shape.sliding_window or 10**6) :]
            keys, values = (
                each.flatten(0, 1)[slots].float().repeat_interleave(group, 1)
                for each in (self.keys, self.values)
            )
            scores = torch.einsum("hd,thd->ht", queries, keys) * shape.head_dim**-0.5
            rows.append(torch.einsum("ht,thd->hd", scores.softmax(-1), values).flatten())
        return torch.stack(rows)


def attention_error(bench: Bench) -> float:
    decode = Decode(bench, CONTEXTS)
    found, expected = decode.attended(bench), decode.expected(bench)
    if found[CONTEXTS.index(0)].any() or decode.memory.finished.any():
        return float("inf")
    live = [row for row, length in enumerate(CONTEXTS) if length]
    return max(error(found[row], expected[row]) for row in live)


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench()


def test_it_equals_float32(bench: Bench) -> None:
    """For contexts of one split and of many, with padding; again with a sliding window."""
    assert attention_error(bench) < ROUNDING
    whole = bench.config
    try:
        bench.config = bench.kernels._config = replace(whole, sliding_window=100)
        assert attention_error(bench) < ROUNDING
    finally:
        bench.config = bench.kernels._config = whole


def test_mixtrals_heads() -> None:
    """Heads of 128, eight of which share a KV head."""
    assert attention_error(Bench(**WIDE)) < ROUNDING


def test_a_row_has_the_same_bits_in_any_batch(bench: Bench) -> None:
    """Alone, with more programs, and with blocks in the other order."""
    whole = Decode(bench, CONTEXTS).attended(bench)
    bench.reverse()
    assert torch.equal(Decode(bench, CONTEXTS).attended(bench), whole)
    bench.reverse()
    for row in (4, 6):
        assert torch.equal(Decode(bench, [CONTEXTS[row]]).attended(bench)[0], whole[row])


def test_the_check_of_a_device_tries_it() -> None:
    """`check --load` compares each row with float32, the longest context too: a kernel that is
    wrong in that one alone fails."""
    card, device = Card(90, 1), torch.device("cpu")
    kernels = StepKernels(kernel_check.CONFIG, card, HostKernels())
    assert 1e-4 < step_attention_error(kernels, kernel_check.CONFIG, device) < ROUNDING

    def edit(name: str, text: str) -> str:
        changed = text.replace("split < count; split++", "split < min(count, 27); split++")
        assert name != "splits.cuh" or changed != text
        return changed

    kernels = StepKernels(kernel_check.CONFIG, card, HostKernels(edit))
    assert step_attention_error(kernels, kernel_check.CONFIG, device) > 5e-2


EDITS = {
    "the new token": ("attention.cu", "first_stop > newest)", "first_stop > newest + 1)"),
    "the slot of a token": ("attention.cu", "+ place % block_size", "+ place % 8"),
    "the half of a value": (
        "attention.cu",
        "words[2], words[3], 0x7632",
        "words[0], words[3], 0x7632",
    ),
    "the head that fades": ("attention.cu", "fades[i % 2]", "fades[0]"),
    "the sums of a split": ("splits.cuh", "head * MAX_SPLITS + split;", "head * MAX_SPLITS;"),
}
"""In which source what is replaced and by what."""


@pytest.mark.parametrize("case", EDITS.values(), ids=EDITS)
def test_a_changed_index_is_found(case: tuple[str, str, str]) -> None:
    """A kernel with one index or condition changed does not pass."""
    assert not edited_error(attention_error, *case) < 2 * ROUNDING


def test_a_barrier_between_splits_is_needed(bench: Bench) -> None:
    """Threads in any order give the same result, and a barrier whose absence a fixed order hides is
    missed in another one."""
    edit = ("attention.cu", "if (done) __syncthreads();", "")
    assert edited_error(attention_error, *edit) < ROUNDING
    assert not edited_error(attention_error, *edit, seed=1) < ROUNDING
    try:
        for seed in (1, 2):
            bench.shuffle(seed)
            assert attention_error(bench) < ROUNDING
    finally:
        bench.shuffle(0)
