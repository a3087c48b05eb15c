"""The first prompts of an engine; a failure becomes one sentence of the load."""

import asyncio

import pytest
import torch

from serve_app.engine.scheduled_tokens import ScheduledTokens
from serve_app.errors import ModelLoadFailed
from serve_app.loading import warm_up
from tests.engine.fake import VOCAB_SIZE, FakeRunner, running


def test_steps_of_several_sizes_and_a_first_token() -> None:
    """The warm-up runs the largest possible step, a quarter and a sixteenth of it, each without a
    hit in the prefix cache, and frees its blocks."""
    runner = FakeRunner()
    with running(runner) as engine:
        warm_up.run_prompts(engine, VOCAB_SIZE, 0)
        chunks = [part.num_tokens for step in runner.steps for part in step if not part.is_decode]
        assert chunks == [32, 32, 8, 2]
        assert engine.stats().prefix_cache_hits == 0
        num_steps = len(runner.steps)
        warm_up.first_token(engine, [1, 2], 0)
        assert len(runner.steps) == num_steps + 1
        assert engine.stats().num_used_blocks == 0


def test_steps_of_few_tokens_are_measured_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where steps of few prompt tokens are computed in another way, the warm-up runs two sizes of
    them, so that the first prediction is not made from one."""
    monkeypatch.setattr(FakeRunner, "few_prompt_tokens", 12)
    runner = FakeRunner()
    with running(runner) as engine:
        warm_up.run_prompts(engine, VOCAB_SIZE, 0)
        chunks = [part.num_tokens for step in runner.steps for part in step if not part.is_decode]
        assert chunks == [32, 32, 8, 2, 12, 3]
        assert warm_up.prompt_sizes(engine.config, 1000)[-2:] == [32, 8]


def test_it_works_inside_an_event_loop() -> None:
    """The warm-up works inside a running event loop, as in a replica's constructor."""

    async def constructor() -> None:
        with running(FakeRunner()) as engine:
            warm_up.first_token(engine, [1], 0)

    asyncio.run(constructor())


def test_a_prompt_that_fails_fails_the_load() -> None:
    """Out of memory names the free memory; any other failure has the engine's sentence."""

    def out_of_memory(chunks: list[ScheduledTokens]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def broken(chunks: list[ScheduledTokens]) -> None:
        raise ValueError("a bug")

    sentence = r"A prompt of 32 tokens needs more memory than the 1\.50 GB that .* cache; lower"
    for before, said in ((out_of_memory, sentence), (broken, "its first prompt failed: An int")):
        with (
            running(FakeRunner(before=before)) as engine,
            pytest.raises(ModelLoadFailed, match=said),
        ):
            warm_up.run_prompts(engine, VOCAB_SIZE, 1_500_000_000)
