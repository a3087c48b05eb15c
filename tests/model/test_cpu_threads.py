"""The threads of a compiled step: their number, which changes no bit, and their end."""

import os
import resource
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from serve_app.model.batch import Batch
from serve_app.model.kernels.cpu.cpu_step import CpuStep
from serve_app.model.kernels.cpu.step_threads import StepThreads
from tests.model.driver import random_ids
from tests.model.test_cpu_step import (
    BLOCK_SIZE,
    NUM_BLOCKS,
    SHAPES,
    cache_of,
    decodes,
    model_of,
    piece,
    step_of,
)

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="it needs a C compiler")

NUM_TASKS = Path("/proc/self/task")


def mixed() -> Batch:
    """Decodes beside prefill chunks; of some rows, in no order, the logits are wanted."""
    lengths = [1, 1, 1, 90, 1, 37, 1, 1, 150]
    ends = [5, 64, 65, 200, 1, 37, 130, 7, 190]
    table = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(4))
    tables = table[: 9 * 50].view(9, 50)
    positions = [torch.arange(e - n, e) for n, e in zip(lengths, ends, strict=True)]
    slots = [
        t[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE
        for t, p in zip(tables, positions, strict=True)
    ]
    wanted = torch.tensor([282, 0, 1, 2, 40, 41, 42, 43, 60, 93, 131, 132])
    return Batch(
        torch.tensor(random_ids(sum(lengths))),
        torch.cat(positions),
        torch.cat(slots),
        lengths,
        ends,
        tables,
        wanted,
    )


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_bits_do_not_depend_on_the_number_of_threads(shape: dict[str, Any], tmp_path: Path) -> None:
    """Logits, keys and values of prompts, decodes and both are equal with 1 to 16 threads."""
    model, _ = model_of(tmp_path, **shape)
    cache = cache_of(model)
    step = step_of(model, cache, 4)
    stored = (*cache.keys, *cache.values)
    generator = torch.Generator().manual_seed(2)
    before = [torch.randn(pages.shape, generator=generator) for pages in stored]
    unsampled = piece(random_ids(141), 0, 141, torch.arange(40))
    unsampled.sample_rows = torch.empty(0, dtype=torch.int64)
    batches = [mixed(), decodes([63, 64, 65, 9, 40]), unsampled]

    def computed(batch: Batch, num_threads: int) -> list[torch.Tensor]:
        for pages, numbers in zip(stored, before, strict=True):
            pages.copy_(numbers)
        return [step.logits(batch, num_threads).clone(), *(pages.clone() for pages in stored)]

    for batch in batches:
        alone = computed(batch, 1)
        assert alone[0].shape == (len(batch.sample_rows), model.config.vocab_size)
        for num_threads in (2, 3, 5, 16):
            found = computed(batch, num_threads)
            assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True)), num_threads


def test_threads_follow_the_work(tmp_path: Path) -> None:
    """Short steps have one thread; long prompts and contexts have more, up to a limit."""
    sizes = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32, "num_hidden_layers": 4}
    model, _ = model_of(tmp_path, **sizes, max_position_embeddings=8192)
    table = torch.arange(NUM_BLOCKS)

    def prompt(length: int, end: int, limit: int = 8) -> int:
        return StepThreads(model, limit).of(piece(random_ids(end), end - length, end, table))

    assert [prompt(n, n) for n in (1, 16, 32)] == [1, 1, 1]
    counts = [prompt(n, n) for n in (64, 256, 512, 1024, 4096)]
    assert counts == sorted(counts)
    assert counts[-1] == 8
    assert [prompt(512, 512, limit) for limit in (1, 2)] == [1, 2]
    assert prompt(64, 4096) > prompt(64, 64)
    threads = StepThreads(model, 8)
    assert threads.of(decodes([64] * 16)) == 1
    assert threads.of(decodes([1000] * 3)) == 1
    assert threads.of(decodes([4000])) == 1


def test_no_thread_outlives_its_step(tmp_path: Path) -> None:
    """After steps of many threads the process has as many threads as before."""
    model, _ = model_of(tmp_path)
    step = step_of(model, cache_of(model), 8)
    before = len(list(NUM_TASKS.iterdir()))
    for _ in range(20):
        step.logits(mixed(), 8)
    assert len(list(NUM_TASKS.iterdir())) == before


def test_a_process_that_is_forked_within_a_step_computes_its_own(tmp_path: Path) -> None:
    """A child forked while threads compute gets the same logits and ends."""
    model, _ = model_of(tmp_path)
    step = step_of(model, cache_of(model), 4)
    batch = decodes([130] * 16)
    expected = step.logits(batch, 1).clone()
    stop = threading.Event()

    def compute() -> None:
        while not stop.is_set():
            step.logits(batch, 4)

    beside = threading.Thread(target=compute)
    beside.start()
    try:
        for _ in range(3):
            child = os.fork()
            if child == 0:
                signal.alarm(60)
                os._exit(0 if torch.equal(step.logits(batch, 4), expected) else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        beside.join()


def is_right_with_few_threads(step: CpuStep, expected: torch.Tensor) -> bool:
    """Asks for 64 threads where there is no address space for their stacks."""
    started: list[int] = []
    start = step._step

    def counted(*arguments: Any) -> int:
        started.append(start(*arguments))
        return started[-1]

    step._step = counted  # type: ignore[assignment]
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 7_000_000, resource.RLIM_INFINITY))
    found = step.logits(mixed(), 64)
    return torch.equal(found, expected) and 1 <= started[0] < 64


def test_a_system_that_refuses_threads_only_slows_a_step(tmp_path: Path) -> None:
    """The threads that can be started compute the whole step."""
    model, _ = model_of(tmp_path)
    step = step_of(model, cache_of(model), 4)
    expected = step.logits(mixed(), 1).clone()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os._exit(0 if is_right_with_few_threads(step, expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
