"""The engine with prescribed logits: what it refuses, what a consumer gets, and in which steps."""

import asyncio
from threading import Thread
from typing import Any

import pytest

from serve_app.engine.delta import Delta
from serve_app.engine.sampling_params import SamplingParams
from serve_app.errors import ContextLengthExceeded, InvalidRequest, QueueFull
from tests.engine.fake import (
    EOS,
    FakeRunner,
    complete,
    config,
    greedy,
    joined,
    logits_of,
    repeat,
    run,
    running,
    settled,
    start,
)


@pytest.mark.parametrize(
    ("prompt", "params", "error", "param"),
    [
        ([], {}, InvalidRequest, "prompt"),
        ([1, 50], {}, InvalidRequest, "prompt"),
        ([-1], {}, InvalidRequest, "prompt"),
        ([1], {"logit_bias": {50: 1.0}}, InvalidRequest, "logit_bias"),
        ([1], {"stop_token_ids": frozenset({-1})}, InvalidRequest, "stop_token_ids"),
        (
            [1],
            {"stop_token_ids": frozenset(range(50)), "min_tokens": 1},
            InvalidRequest,
            "min_tokens",
        ),
        ([1] * 55, {}, ContextLengthExceeded, "max_tokens"),
        ([1] * 32, {}, ContextLengthExceeded, "max_tokens"),  # 41 tokens in ten blocks of four
    ],
)
def test_a_request_that_can_never_run_is_refused(
    prompt: list[int], params: dict[str, Any], error: type[InvalidRequest], param: str | None
) -> None:
    """The first iteration raises an error that names the field, and no step runs."""
    runner = FakeRunner()
    num_blocks = 10 if len(prompt) == 32 else 128
    with running(runner, num_blocks=num_blocks) as engine:
        with pytest.raises(error) as caught:
            run(complete(engine, prompt, SamplingParams(max_tokens=10, **params)))
        assert type(caught.value) is error
        assert caught.value.param == param
        assert runner.steps == []


def test_the_longest_request_that_can_run_runs() -> None:
    """Prompt and max_tokens may fill the context, and the KV cache except for the last token."""
    with running(FakeRunner(), max_model_len=41, num_blocks=10) as engine:
        tokens, reason, _ = run(complete(engine, [1] * 31, greedy(10, ignore_eos=True)))
    assert (len(tokens), reason) == (10, "length")


def test_more_running_sequences_than_step_tokens_are_refused() -> None:
    """EngineConfig refuses max_num_seqs above max_num_batched_tokens."""
    with pytest.raises(ValueError, match="max_num_batched_tokens"):
        config(max_num_seqs=33, max_num_batched_tokens=32)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({}, ([7, 8], "stop")),
        ({"ignore_eos": True}, ([7, 8, EOS, EOS, EOS], "length")),
        ({"stop_token_ids": frozenset({8})}, ([7], "stop")),
        ({"stop_token_ids": frozenset({7})}, ([], "stop")),
        ({"stop_token_ids": frozenset({8}), "ignore_eos": True}, ([7], "stop")),
        # What is likeliest is forbidden; of the others, which are equal, the first is taken.
        ({"min_tokens": 4}, ([7, 8, 0, 0], "stop")),
        ({"stop_token_ids": frozenset({7}), "min_tokens": 1}, ([0, 8], "stop")),
    ],
    ids=str,
)
def test_stop_tokens_end_a_request_and_are_not_returned(
    how: dict[str, Any], expected: tuple[list[int], str]
) -> None:
    """A stop token ends with "stop", unless ignored or before min_tokens; max_tokens gives
    "length"."""
    with running(FakeRunner(repeat(7, 8))) as engine:
        tokens, reason, _ = run(complete(engine, [1], greedy(5, **how)))
    assert (tokens, reason) == expected


def test_logprobs_come_with_their_tokens() -> None:
    """All returned tokens have a logprob, and the stop token has none."""
    with running(FakeRunner(repeat(7, 8))) as engine:
        tokens, _, logprobs = run(complete(engine, [1], greedy(5, logprobs=2)))
    assert [logprob.token_id for logprob in logprobs] == tokens == [7, 8]
    assert all(len(logprob.top_ids) == 2 for logprob in logprobs)


def test_a_slow_consumer_gets_one_delta() -> None:
    """Tokens of many steps come as one delta, the last one, to a consumer that did not read."""
    runner = FakeRunner(is_held=True)

    async def look_late() -> list[Delta]:
        slow, first = await start(engine, runner, greedy(6, ignore_eos=True, logprobs=0))
        assert len(first.token_ids) == 1
        runner.let_go()
        await complete(engine, [4], greedy(12, ignore_eos=True))
        return [first, *[delta async for delta in slow]]

    with running(runner) as engine:
        deltas = run(look_late())
    tokens, reason, logprobs = joined(deltas)
    assert (len(deltas), len(tokens), reason) == (2, 6, "length")
    assert [logprob.token_id for logprob in logprobs] == tokens


def test_a_step_wakes_the_event_loop_once() -> None:
    """Eight streams of ten tokens cost at most one callback per step, not one per token."""
    runner = FakeRunner(is_held=True)

    async def count() -> int:
        loop = asyncio.get_running_loop()
        calls = 0
        original = loop.call_soon_threadsafe

        def counting(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return original(*args, **kwargs)

        loop.call_soon_threadsafe = counting  # type: ignore[method-assign, assignment]
        requests = [complete(engine, [i], greedy(10, ignore_eos=True)) for i in range(8)]
        together = asyncio.gather(*requests)
        await asyncio.sleep(0)  # all are submitted before the first step
        runner.let_go()
        await together
        return calls

    with running(runner) as engine:
        calls = run(count())
        assert calls <= engine.stats().num_steps < 20


def test_requests_of_several_event_loops_run_together() -> None:
    """Three threads with an event loop each get the answers that one loop gets."""
    params = SamplingParams(max_tokens=20, seed=4, ignore_eos=True)
    found: dict[int, Any] = {}
    with running(FakeRunner()) as engine:

        async def several(first: int) -> Any:
            return await asyncio.gather(
                *(complete(engine, [first, i], params) for i in range(first, first + 4))
            )

        threads = [Thread(target=lambda i=i: found.update({i: run(several(i))})) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        expected = {i: run(several(i)) for i in range(3)}
    assert found == expected


def test_a_full_queue_refuses() -> None:
    """Beyond max_num_seqs + max_waiting: QueueFull with retry_after_s; accepted requests finish."""
    runner = FakeRunner(is_held=True)

    async def overfill() -> None:
        accepted = [
            asyncio.ensure_future(complete(engine, [i], greedy(4, ignore_eos=True)))
            for i in range(5)
        ]
        await asyncio.sleep(0)
        for _ in range(2):
            with pytest.raises(QueueFull) as caught:
                await complete(engine, [9], greedy(4))
            assert caught.value.retry_after_s == 7
        runner.let_go()
        assert [len(tokens) for tokens, _, _ in await asyncio.gather(*accepted)] == [4] * 5
        await settled(engine)

    with running(runner, max_num_seqs=2, max_waiting=3, retry_after_s=7) as engine:
        run(overfill())


def test_a_long_prompt_does_not_stall_a_stream() -> None:
    """While a prompt of 15 steps is computed, a running stream gets a token in every step."""
    runner = FakeRunner(is_held=True)

    async def both() -> None:
        stream, _ = await start(engine, runner, greedy(200, ignore_eos=True))
        long = asyncio.ensure_future(complete(engine, [6] * 120, greedy(1)))
        await asyncio.sleep(0)
        runner.let_go()
        await long
        await stream.aclose()

    with running(runner, max_model_len=300, max_num_seqs=2, max_num_batched_tokens=9) as engine:
        run(both())
    prefill = [step for step in runner.steps if any(len(c.sequence.token_ids) > 100 for c in step)]
    assert len(prefill) >= 15
    assert all(step[0].is_sampled and step[0].end - step[0].start == 1 for step in prefill)


def test_an_idle_engine_makes_no_steps() -> None:
    """Steps run for requests only, and are counted with their tokens."""
    runner = FakeRunner()
    with running(runner) as engine:
        run(complete(engine, [1, 2, 3], greedy(5, ignore_eos=True)))
        stats = engine.stats()
        assert len(runner.steps) == stats.num_steps == 5
        assert (stats.num_prompt_tokens, stats.num_generation_tokens) == (3, 5)
        assert stats.num_blocks == 128


def test_greedy_takes_the_best_prescribed_logit() -> None:
    """Greedy output is the argmax of the prescribed logits, token by token."""
    with running(FakeRunner()) as engine:
        tokens, _, _ = run(complete(engine, [1, 2], greedy(9, ignore_eos=True)))
    so_far = [1, 2]
    for token in tokens:
        assert token == int(logits_of(so_far).argmax())
        so_far.append(token)
