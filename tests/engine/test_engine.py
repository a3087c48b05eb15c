"""The engine with prescribed logits: what a consumer gets, and when KV blocks are freed."""

import asyncio
from threading import Thread
from typing import Any

import pytest

from serve_app.engine.delta import Delta
from serve_app.engine.engine import Engine
from serve_app.engine.sampling_params import SamplingParams
from serve_app.engine.stream import Stream
from serve_app.errors import (
    ContextLengthExceeded,
    DeadlinePassed,
    Draining,
    InvalidRequest,
    QueueFull,
)
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
    """Each returned token has a logprob, and the stop token has none."""
    with running(FakeRunner(repeat(7, 8))) as engine:
        tokens, _, logprobs = run(complete(engine, [1], greedy(5, logprobs=2)))
    assert [logprob.token_id for logprob in logprobs] == tokens == [7, 8]
    assert all(len(logprob.top) == 2 for logprob in logprobs)


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


async def settled(engine: Engine) -> None:
    """Returns when the engine has taken all requests and aborts that were sent before."""
    await complete(engine, [9], greedy(1, ignore_eos=True))


@pytest.mark.parametrize("how", ["close", "cancel"])
def test_leaving_frees_the_blocks_at_the_next_step(how: str) -> None:
    """After the generator is closed or its task cancelled, the next step has no such sequence."""
    runner = FakeRunner(is_held=True)

    async def leave() -> None:
        request, _ = await start(engine, runner, greedy(50, ignore_eos=True))
        if how == "close":
            await request.aclose()
        else:
            task = asyncio.ensure_future(anext(request))
            await asyncio.sleep(0)  # now it waits for its next delta
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        runner.let_go()
        await settled(engine)
        stats = engine.stats()
        assert (stats.num_running, stats.num_waiting, stats.num_used_blocks) == (0, 0, 0)
        # Its first step, the one that was in flight, and the other request's.
        assert len(runner.steps) == 3

    with running(runner) as engine:
        run(leave())


@pytest.mark.parametrize("wait_s", [0.0, 0.05])
def test_a_deadline_ends_a_request_and_frees_its_blocks(wait_s: float) -> None:
    """A deadline in the past, or during a long step, raises DeadlinePassed at once."""
    runner = FakeRunner(is_held=True)

    async def late() -> None:
        deadline = asyncio.get_running_loop().time() + wait_s
        with pytest.raises(DeadlinePassed):
            await anext(engine.generate([1, 2], greedy(50, ignore_eos=True), deadline))
        runner.let_go()
        await settled(engine)
        stats = engine.stats()
        assert (stats.num_running, stats.num_waiting, stats.num_used_blocks) == (0, 0, 0)

    with running(runner) as engine:
        run(late())


def test_tokens_before_a_deadline_are_delivered() -> None:
    """Tokens that the consumer has not read when the deadline passes come with the error."""

    async def late() -> Delta:
        stream = Stream(asyncio.get_running_loop())
        stream.put(Delta([8], []))
        stream.expire()
        return await stream.next()

    delta = run(late())
    assert delta.token_ids == [8]
    assert isinstance(delta.error, DeadlinePassed)


def test_first_tokens_with_an_error_have_their_queue_time() -> None:
    """First tokens that come with an error are yielded with `queued_s`; then it is raised."""
    runner = FakeRunner(is_held=True)
    runner.allow(2)

    async def late() -> None:
        deadline = asyncio.get_running_loop().time() + 0.01
        request = engine.generate([1, 2], greedy(50, ignore_eos=True), deadline)
        first = asyncio.ensure_future(anext(request))
        await asyncio.sleep(0)
        # The event loop is blocked, and then gets both at once: once there is a second token, the
        # first one has been sent.
        while (
            asyncio.get_running_loop().time() <= deadline
            or engine.stats().num_generation_tokens < 2
        ):
            pass
        delta = await first
        assert delta.token_ids
        assert (delta.finish_reason, delta.error) == (None, None)
        assert (delta.queued_s or 0) > 0
        with pytest.raises(DeadlinePassed):
            await anext(request)

    with running(runner) as engine:
        run(late())


def test_leaving_the_queue_costs_no_step() -> None:
    """A request that is cancelled while it waits never runs."""
    runner = FakeRunner(is_held=True)

    async def leave() -> None:
        first, _ = await start(engine, runner, greedy(20, ignore_eos=True))
        waiting = asyncio.ensure_future(complete(engine, [42], greedy(5)))
        await asyncio.sleep(0)
        assert engine.stats().num_waiting == 1
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        runner.let_go()
        async for _ in first:
            pass
        await settled(engine)

    with running(runner, max_num_seqs=1) as engine:
        run(leave())
        assert all(chunk.sequence.token_ids[0] != 42 for step in runner.steps for chunk in step)
        assert engine.stats().num_waiting == 0


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


def test_a_request_of_a_closed_event_loop_is_dropped() -> None:
    """Blocks are freed when the consumer's loop closes with its generator open; others go on."""
    runner = FakeRunner(is_held=True)
    with running(runner) as engine:
        loop = asyncio.new_event_loop()
        request, _ = loop.run_until_complete(start(engine, runner, greedy(60, ignore_eos=True)))
        loop.close()
        runner.let_go()
        run(complete(engine, [5], greedy(3, ignore_eos=True)))
        assert engine.stats().num_used_blocks == 0
        assert len(runner.steps) < 10
        del request


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


def test_stop_ends_all_requests_and_refuses_new_ones() -> None:
    """Running and waiting requests end with Draining, later ones are refused, the thread ends."""
    runner = FakeRunner(repeat(7), is_held=True)
    endless = 100_000

    async def stopped() -> None:
        first, _ = await start(engine, runner, greedy(endless, ignore_eos=True))
        waiting = asyncio.ensure_future(complete(engine, [4], greedy(5)))
        await asyncio.sleep(0)
        stop = asyncio.ensure_future(asyncio.to_thread(engine.stop))
        runner.let_go()
        await stop
        with pytest.raises(Draining):
            async for _ in first:
                pass
        with pytest.raises(Draining):
            await waiting
        with pytest.raises(Draining):
            await complete(engine, [4], greedy(5))

    room = {"max_model_len": endless + 2, "num_blocks": endless}
    with running(runner, max_num_seqs=1, **room) as engine:
        assert engine.is_alive
        run(stopped())
        assert not engine.is_alive
        assert engine.stats().num_used_blocks == 0


def test_greedy_takes_the_best_prescribed_logit() -> None:
    """Greedy output is the argmax of the prescribed logits, token by token."""
    with running(FakeRunner()) as engine:
        tokens, _, _ = run(complete(engine, [1, 2], greedy(9, ignore_eos=True)))
    so_far = [1, 2]
    for token in tokens:
        assert token == int(logits_of(so_far).argmax())
        so_far.append(token)
