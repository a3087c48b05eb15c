"""Prompts beside streams, with the real engine core on a simulated device."""

import random
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from serve_app.engine.engine_config import EngineConfig
from serve_app.engine.prefill_policy import PrefillPolicy
from serve_app.engine.step_cost import MAX_RELATIVE_ERROR, StepShape
from tools.simulated_engine import HOST_S, Arrival, SimulatedEngine

MAX_STALL_S = 0.35
SHARE = 0.8
MAX_TOKENS = 4096

Times = Callable[[StepShape], float]


def times_of(decode: float, fixed: float, token: float, score: float = 0.0) -> Times:
    """Milliseconds of a step of decodes, of a step with prompt tokens, and of each of them."""

    def seconds(shape: StepShape) -> float:
        decodes = decode * (1 + 0.05 * shape.num_decodes) if shape.num_decodes else 0.0
        if not shape.num_prompt_tokens:
            return decodes / 1000
        prompt = fixed + token * shape.num_prompt_tokens + score * shape.num_scores
        return (max(decodes, 0.1) + prompt) / 1000

    return seconds


H200 = times_of(8.5, 222, 0.024)


def engine_of(times: Times, *, is_gpu: bool = True, launch_blocks: bool = False) -> SimulatedEngine:
    """Returns an engine that has run the prompts of a warm-up."""
    config = EngineConfig(16_384, 64, 10_000, 16, 40_000, MAX_TOKENS, frozenset())
    policy = PrefillPolicy(MAX_TOKENS, MAX_STALL_S, SHARE)
    how = {"can_overlap_steps": is_gpu, "launch_blocks": launch_blocks}
    engine = SimulatedEngine(config, times, policy, **how)
    for num_tokens in (MAX_TOKENS, MAX_TOKENS, MAX_TOKENS // 4, MAX_TOKENS // 16):
        engine.run([Arrival(engine.clock(), num_tokens, 3)])
    engine.device.steps.clear()
    engine.device.ends.clear()
    return engine


def after(engine: SimulatedEngine, *arrivals: Arrival) -> list[Arrival]:
    """Runs requests whose times count from now."""
    for arrival in arrivals:
        arrival.at += engine.clock()
    return engine.run(arrivals)


ARRIVALS = st.lists(
    st.tuples(st.floats(0, 4), st.integers(1, 6000), st.integers(1, 60)), min_size=1, max_size=25
)
TIMES = st.builds(
    times_of,
    decode=st.floats(1, 30),
    fixed=st.floats(0, 250),
    token=st.floats(0.001, 0.2),
    score=st.floats(0, 2e-5),
)


@settings(max_examples=60)
@given(times=TIMES, arrivals=ARRIVALS, is_gpu=st.booleans())
@example(
    times=times_of(decode=1.0, fixed=184.0, token=0.09375, score=0.0),
    arrivals=[(1.5, 2, 2), (1.625, 2182, 1)],
    is_gpu=False,
)
@example(
    times=times_of(decode=1.0, fixed=204.0, token=0.1015625, score=0.0),
    arrivals=[(1.0, 1904, 1), (0.5, 2198, 60)],
    is_gpu=False,
)
def test_the_promise_holds_and_nothing_is_computed_twice(
    times: Times, arrivals: list[tuple[float, int, int]], is_gpu: bool
) -> None:
    """For any step times, no gap of a stream exceeds `max_stall_s` by more than the allowance.

    The allowance is `MAX_RELATIVE_ERROR`, because a prediction within it is not corrected, and one
    step of decodes; or the smallest prefill chunk if that is longer. Every request ends, each token
    is computed once, and every iteration of the loop computes something.
    """
    engine = engine_of(times, is_gpu=is_gpu)
    turns = engine.num_turns
    ended = after(engine, *(Arrival(*arrival) for arrival in arrivals))
    assert len(ended) == len(arrivals)
    assert all(len(arrival.token_times) == arrival.num_output_tokens for arrival in ended)
    smallest = times(StepShape(64, 64 * 6000, MAX_TOKENS // 32, 6000 * MAX_TOKENS // 32))
    longest = max((gap for arrival in ended for gap in arrival.gaps_s), default=0.0)
    decodes = times(StepShape(64, 64 * 6000, 0, 0))
    assert longest <= max(MAX_STALL_S, smallest) * (1 + MAX_RELATIVE_ERROR) + decodes + 3 * HOST_S
    computed = sum(step.num_prompt_tokens + step.num_decodes for step in engine.device.steps)
    assert computed == sum(prompt + answer - 1 for _, prompt, answer in arrivals)
    assert engine.num_turns - turns <= len(engine.device.steps) + 2 * len(arrivals) + 2


def test_a_long_prompt_beside_a_stream_starts_at_once() -> None:
    """With an H200's times, the first token of 4,096 tokens beside a stream comes within three
    times the time that it takes alone."""
    alone = after(engine_of(H200), Arrival(0, 4096, 1))[0].first_token_s
    engine = engine_of(H200)
    ended = after(engine, Arrival(0, 20, 2000), Arrival(1, 4096, 10))
    long = next(arrival for arrival in ended if arrival.num_new_tokens == 4096)
    assert long.first_token_s < 3 * alone


def test_prompts_and_streams_share_the_time() -> None:
    """While prompts and streams both wait all the time, steps with prompt tokens take their share
    of it."""
    engine = engine_of(H200)
    prompts = [Arrival(0.5, 3000, 2) for _ in range(200)]
    after(engine, *(Arrival(0, 20, 4000) for _ in range(8)), *prompts)
    first, last = (
        next(i for i in order if engine.device.steps[i].num_prompt_tokens > 1000)
        for order in (
            range(len(engine.device.steps)),
            reversed(range(len(engine.device.steps))),
        )
    )
    mixed = engine.device.steps[first : last + 1]
    with_prompts = sum(H200(step) for step in mixed if step.num_prompt_tokens)
    share = with_prompts / sum(map(H200, mixed))
    assert share == pytest.approx(SHARE, abs=0.04)


def test_a_short_prompt_does_not_wait_for_the_share_of_a_long_one() -> None:
    """A prompt that comes just after a long one gets its first token at once: prompts wait only
    after a burst."""
    engine = engine_of(H200)
    stream, long = Arrival(0, 20, 500), Arrival(1, 3000, 2)
    ended = after(engine, stream, long, Arrival(1.4, 100, 2))
    short = next(arrival for arrival in ended if arrival.num_new_tokens == 100)
    assert short.first_token_s < 0.6


def test_short_prompts_share_a_step() -> None:
    """Sixteen short prompts that come at once beside a stream take one or two steps."""
    engine = engine_of(H200)
    after(engine, Arrival(0, 20, 300), *(Arrival(1, 100, 2) for _ in range(16)))
    steps = [step for step in engine.device.steps if step.num_prompt_tokens >= 100]
    assert len(steps) <= 2


@pytest.mark.parametrize("launch_blocks", [False, True])
def test_a_step_is_charged_its_own_time(
    launch_blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy learns the device's time of each step, whether launches block the host or not."""
    engine = engine_of(H200, launch_blocks=launch_blocks)
    seen: list[tuple[StepShape, float]] = []
    finished = PrefillPolicy.finished

    def spy(self: PrefillPolicy, shape: StepShape, predicted_s: float, seconds: float) -> None:
        seen.append((shape, seconds))
        finished(self, shape, predicted_s, seconds)

    monkeypatch.setattr(PrefillPolicy, "finished", spy)
    draw = random.Random(1)
    after(engine, *(Arrival(draw.uniform(0, 3), draw.choice([50, 2000]), 20) for _ in range(12)))
    assert [shape for shape, _ in seen] == engine.device.steps
    assert all(seconds == pytest.approx(H200(shape)) for shape, seconds in seen)


def test_tokens_that_seem_dear_are_tried_again() -> None:
    """A policy that has seen only tiny prompt steps, with a large fixed cost, computes larger ones
    and learns that their tokens are cheap."""
    policy = PrefillPolicy(MAX_TOKENS, MAX_STALL_S, SHARE)
    decodes = StepShape(4, 2000, 0, 0)
    for _ in range(20):
        policy.finished(decodes._replace(num_prompt_tokens=2, num_scores=3), 0.0, 0.23)
        policy.finished(decodes, 0.0, 0.0085)
    sizes = []
    for _ in range(6):
        while not (budget := policy.budget(decodes, MAX_TOKENS)).is_open:
            policy.finished(decodes, policy.launched(decodes), 0.0085)
        sizes.append(budget.take(0, MAX_TOKENS))
        shape = decodes._replace(num_prompt_tokens=sizes[-1], num_scores=sizes[-1] ** 2 // 2)
        policy.finished(shape, policy.launched(shape), 0.23 + 0.000024 * sizes[-1])
    assert sizes[0] >= MAX_TOKENS // 32
    assert sizes[-1] > MAX_TOKENS * 0.9


def test_the_budget_is_open_without_streams() -> None:
    """If no stream is running, a prompt gets a whole step, even with a debt to earlier streams."""
    policy = PrefillPolicy(MAX_TOKENS, MAX_STALL_S, SHARE)
    mixed = StepShape(4, 2000, 100, 5000)
    for _ in range(20):
        policy.finished(mixed, policy.launched(mixed), 0.35)
    assert not policy.budget(StepShape(4, 2000, 0, 0), MAX_TOKENS).is_open
    assert policy.budget(StepShape(0, 0, 0, 0), MAX_TOKENS).take(0, 9999) == MAX_TOKENS
