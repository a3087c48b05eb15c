"""A whole decode step whose kernels start before the last one has written anything."""

import pytest
import torch
from torch import Tensor

from serve_app.model.kernels.cuda import use_kernels
from serve_app.model.kernels.cuda.cuda_step import CudaStep
from serve_app.model.kernels.cuda.launchable import MakeKernel
from serve_app.model.kernels.cuda.use_kernels import try_kernels
from serve_app.model.kernels.decode_batch import DecodeBatch
from serve_app.model.kv import KVCache
from tests.model.kernels.cuda.emulator import has_compiler
from tests.model.kernels.cuda.host_kernels import HostKernels, OverlappingKernels
from tests.model.kernels.cuda.test_use_kernels import CARD, CPU, model_of

pytestmark = pytest.mark.skipif(not has_compiler(), reason="g++ compiles the kernels for the host")

CONTEXTS = (1, 0, 150)
"""A first token, padding, and a context of several splits."""


@pytest.fixture(autouse=True)
def _no_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(use_kernels, "largest_error", lambda *_: torch.zeros(1))
    monkeypatch.setattr(use_kernels, "attention_error", lambda *_: 0.0)


def step(make: MakeKernel) -> tuple[Tensor, KVCache]:
    """The hidden state of the rows that are no padding, and the cache, after a step of a layer."""
    torch.manual_seed(0)
    model = model_of()
    try_kernels(model, CARD, make)
    cache = KVCache.allocate(model.config, 12, 16, torch.bfloat16, CPU)
    for stored in (*cache.keys, *cache.values):
        stored.normal_()
    lens = torch.tensor(CONTEXTS)
    positions = (lens - 1).clamp(min=0)
    tables = torch.tensor([[11] * 10, [0] * 10, list(range(10))])
    slots = tables.gather(1, positions[:, None] // 16)[:, 0] * 16 + positions % 16
    batch = DecodeBatch(torch.tensor([3, 0, 5]), positions, slots, lens.int(), tables.int())
    return CudaStep(model, cache, 3).hidden(batch)[lens > 0], cache


@pytest.mark.parametrize("seed", [0, 1])
def test_a_step_is_the_same(seed: int) -> None:
    """Bit for bit, with blocks and threads in their order and in a random one: no kernel reads what
    the one before it writes, or writes at all, before it has waited."""
    expected, cache = step(HostKernels())
    overlapping = OverlappingKernels(seed=seed)
    found, other = step(overlapping)
    assert torch.equal(found, expected)
    for mine, theirs in zip(
        (*other.keys, *other.values), (*cache.keys, *cache.values), strict=True
    ):
        assert torch.equal(mine, theirs)
    # Each kernel but the first reads what the last one has changed, so something was hidden.
    assert all(count > 0 for _, count in overlapping.changes[1:])
    assert len(overlapping.changes) == 8 + 1


EARLY: dict[str, tuple[str, dict[str, str]]] = {
    "the routing": ("tiles.cuh", {"WAITS_FOR_JOBS (OUTPUT == GATE_UP)": "WAITS_FOR_JOBS 0"}),
    "the new token": (
        "attention.cu",
        {
            "  wait_for_previous();\n  if (is_loaded": "  if (is_loaded",
            "  if (span.count == 0": "  wait_for_previous();\n  if (span.count == 0",
        },
    ),
    "the parts": (
        "add_norm.cu",
        {
            "  wait_for_previous();\n\n": "",
            "  *mine = packed;": "  wait_for_previous();\n  *mine = packed;",
        },
    ),
}
"""What is read too early, in which source, what is replaced and by what."""


@pytest.mark.parametrize("case", EARLY.values(), ids=EARLY)
def test_what_is_read_too_early_is_found(case: tuple[str, dict[str, str]]) -> None:
    """A kernel that reads before it waits is right only if the last one has ended by then."""
    file, replaced = case

    def edit(name: str, text: str) -> str:
        for old, new in replaced.items():
            assert name != file or text.count(old) == 1
            text = text.replace(old, new) if name == file else text
        return text

    expected, _ = step(HostKernels(edit))
    assert expected.isfinite().all()
    found, _ = step(OverlappingKernels(edit))
    assert not torch.equal(found, expected)
