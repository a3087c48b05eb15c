"""Async scheduling: steps launched before the last one's tokens are known give the same tokens."""

import asyncio
import random
import threading
from itertools import count
from typing import Any

import pytest

from serve_app.engine.engine import Engine
from serve_app.engine.in_flight_tokens import InFlightTokens
from serve_app.engine.model_runner import ModelRunner
from serve_app.engine.sampling_params import SamplingParams
from serve_app.engine.scheduled_tokens import ScheduledTokens
from serve_app.errors import InternalError
from tests.engine.fake import complete, run
from tests.engine.mixtral import (
    NUM_TOKENS,
    Pair,
    answers,
    assert_same,
    greedy,
    poisoned,
    prompts,
    serving,
    together,
)


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by one with each step that takes the last step's tokens on the device."""
    steps: list[int] = []
    feed = ModelRunner._feed

    def spy(self: ModelRunner, scheduled: Any, token_ids: Any) -> None:
        steps.append(len(scheduled))
        feed(self, scheduled, token_ids)

    monkeypatch.setattr(ModelRunner, "_feed", spy)
    return steps


def requests(penalized: bool) -> list[tuple[list[int], SamplingParams]]:
    """Requests of every kind, with answers of every length from one token on."""
    rng = random.Random(5)
    made = []
    for i, prompt in enumerate(prompts(28, seed=6)):
        how: dict[str, Any] = {"max_tokens": rng.choice([1, 2, 3, 9, 24]), "seed": i}
        how["temperature"] = rng.choice([0.0, 0.7, 1.3])
        how |= rng.choice([{}, {"top_k": 9}, {"top_p": 0.8}, {"min_p": 0.05}, {"logprobs": 2}])
        how |= rng.choice([{}, {"min_tokens": 4}, {"logit_bias": {3: 5.0, 70: -2.0}}])
        how["stop_token_ids"] = frozenset(rng.sample(range(96), rng.choice([0, 8, 20])))
        if penalized and rng.random() < 0.3:
            how |= {"repetition_penalty": 1.3, "presence_penalty": 0.5}
        made.append((prompt, SamplingParams(ignore_eos=True, **how)))
    return made


def test_on_a_cpu_a_token_is_delivered_before_the_next_step_begins(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second launch waits until the consumer has the first token, and the request completes."""
    has_token, launches, launch = threading.Event(), count(1), ModelRunner.launch

    def waiting(self: ModelRunner, scheduled: list[ScheduledTokens]) -> InFlightTokens:
        if next(launches) == 2 and not has_token.wait(timeout=30):
            raise TimeoutError("the first token did not reach its consumer")
        return launch(self, scheduled)

    async def read(engine: Engine) -> int:
        num_tokens = 0
        async for delta in engine.generate([1, 2, 3], greedy()):
            num_tokens += len(delta.token_ids)
            has_token.set()
        return num_tokens

    monkeypatch.setattr(ModelRunner, "launch", waiting)
    with serving(pair.ours) as engine:
        assert run(read(engine)) == NUM_TOKENS


@pytest.mark.parametrize("penalized", [False, True])
def test_every_kind_of_request_gets_the_same(pair: Pair, fed: list[int], penalized: bool) -> None:
    """Tokens, logprobs and finish reasons are the same with overlapping steps and without."""
    asked = requests(penalized)
    with serving(pair.ours, can_overlap_steps=False) as engine:
        expected = together(engine, asked)
    assert not fed
    with serving(pair.ours, can_overlap_steps=True) as engine:
        found = together(engine, asked)
        assert engine.stats().num_used_blocks == 0
    assert [answer[:2] for answer in found] == [answer[:2] for answer in expected]
    for (_, _, one), (_, _, other) in zip(found, expected, strict=True):
        assert [p.token_id for p in one] == [p.token_id for p in other]
        # Prompts were cut by time, so that the last bits differ.
        assert [p.logprob for p in one] == pytest.approx([p.logprob for p in other], abs=1e-4)
    assert {reason for _, reason, _ in expected} == {"stop", "length"}
    assert penalized or len(fed) > 20


@pytest.mark.parametrize("num_blocks", [512, 60])
def test_preemption_and_shared_prefixes(pair: Pair, fed: list[int], num_blocks: int) -> None:
    """Answers stay the same when sequences are preempted in flight, and when they share blocks."""
    system = prompts(1, seed=1, longest=1)[0] * 21
    some = [system + more for more in prompts(24, seed=2, longest=9)]
    with serving(pair.ours, enable_prefix_caching=False) as engine:
        expected = answers(engine, some, greedy())
    with serving(pair.ours, num_blocks=num_blocks, can_overlap_steps=True) as engine:
        first, second = (answers(engine, some, greedy()) for _ in range(2))
        stats = engine.stats()
    assert fed
    assert stats.num_used_blocks == 0
    assert (stats.num_preemptions > 0) == (num_blocks == 60)
    assert_same(pair, some, first, expected)
    assert_same(pair, some, second, expected)


def test_an_abort_in_flight_leaves_the_others_alone(pair: Pair) -> None:
    """The aborted token is dropped, and the next owners of the blocks have their own answers."""
    some = prompts(12, seed=8)
    with serving(pair.ours) as engine:
        expected = answers(engine, some, greedy())

    async def leave(engine: Engine, prompt: list[int], after: int) -> None:
        request = engine.generate(prompt, greedy())
        for _ in range(after):
            await anext(request)
        await request.aclose()

    async def run_all(engine: Engine) -> list[Any]:
        """Runs 12 requests to their end, beside 36 that leave after a few deltas."""
        leaving = [leave(engine, prompt, 1 + i % 3) for i, prompt in enumerate(some[::-1] * 3)]
        staying = [complete(engine, prompt, greedy()) for prompt in some]
        return (await asyncio.gather(*staying, *leaving))[: len(some)]

    with serving(pair.ours, num_blocks=200, can_overlap_steps=True) as engine:
        found = [tokens for tokens, _, _ in run(run_all(engine))]
        again = answers(engine, some, greedy())
        assert engine.stats().num_used_blocks == 0
    assert_same(pair, some, found, expected)
    assert_same(pair, some, again, expected)


def test_a_nan_costs_its_request_alone(pair: Pair) -> None:
    """A NaN is found when the next step is in flight; its request fails and the others do not."""
    some = prompts(6, seed=9)
    with serving(pair.ours) as engine:
        expected = answers(engine, some, greedy())
    said = {token for answer in expected for token in answer}
    said |= {token for prompt in some for token in prompt}
    token = next(token for token in range(96) if token not in said)

    async def with_poison(engine: Engine) -> list[Any]:
        bad = complete(engine, [*some[0], token], greedy())
        good = (complete(engine, prompt, greedy()) for prompt in some)
        return await asyncio.gather(bad, *good, return_exceptions=True)

    with serving(pair.ours, num_blocks=120, can_overlap_steps=True) as engine:
        with poisoned(pair.ours, token):
            failed, *others = run(with_poison(engine))
        assert isinstance(failed, InternalError)
        assert_same(pair, some, [tokens for tokens, _, _ in others], expected)
        assert_same(pair, some, answers(engine, some, greedy()), expected)
