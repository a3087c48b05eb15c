"""The timed engine counts decode steps apart from prefill."""

import torch

from benchmarks.timed_engine import CPU, NullRunner, TimedEngine
from serve_app.model.checkpoint.checkpoint import inspect
from serve_app.model.checkpoint.loader import load
from serve_app.tiny import CHECKPOINT


def test_decode_steps_are_counted_apart_from_prefill() -> None:
    """Two sequences start together; only steps in which both decode are counted."""
    model = load(inspect(CHECKPOINT), dtype=torch.float32, device=CPU)
    timed = TimedEngine(model, NullRunner).decode(2, 8, 20, temperature=0.0)
    clock, thread = timed.decode_steps(2)
    # Both prompts are computed in the first step; 19 steps decode, which 18 pairs tell apart.
    assert len(clock) == len(thread) == 18
    assert all(0 < of_thread for of_thread in thread)
    assert sum(tokens for *_, tokens in timed.steps) == 2 * (8 + 19)
