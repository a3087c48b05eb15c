"""The prediction of a step's time, on devices whose times are known."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.engine import step_cost
from serve_app.engine.step_cost import StepCost, StepShape


def prompt(start: int, num_tokens: int, num_decodes: int = 0, context: int = 500) -> StepShape:
    """Returns a step with one prefill chunk."""
    scores = num_tokens * start + num_tokens * (num_tokens + 1) // 2
    return StepShape(num_decodes, num_decodes * context, num_tokens, scores)


def decodes(count: int, context: int) -> StepShape:
    """Returns a step that only decodes."""
    return StepShape(count, count * context, 0, 0)


@settings(max_examples=50)
@given(
    fixed=st.floats(0, 0.3),
    token=st.floats(1e-6, 1e-3),
    score=st.floats(0, 1e-7),
    outliers=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_prompts_of_other_sizes_are_predicted(
    fixed: float, token: float, score: float, outliers: int, seed: int
) -> None:
    """After forty steps with noise and a few very slow ones, steps of other sizes within the
    measured range are predicted to a fifth."""
    draw = random.Random(seed)
    cost = StepCost()

    def seconds(shape: StepShape) -> float:
        return 0.001 + fixed + token * shape.num_prompt_tokens + score * shape.num_scores

    for number in range(40):
        shape = prompt(draw.choice([0, 512, 4096]), draw.choice([16, 64, 256, 1024, 4096]))
        slow = 10 if number % 13 == 5 and number // 13 < outliers else 1
        cost.observe(shape, seconds(shape) * draw.uniform(0.95, 1.05) * slow)
    for shape in (prompt(0, 100), prompt(0, 3000), prompt(2048, 700)):
        assert cost.seconds(shape) == pytest.approx(seconds(shape), rel=0.2)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_decodes_beside_a_prompt_cost_what_they_cost_there(share: float) -> None:
    """Decodes may be free beside prompt tokens, as on a GPU, or take their own time, as on a CPU:
    the prediction for 64 decodes follows what was measured with 4 and 32."""
    cost = StepCost()
    for count in (1, 4, 16, 32, 64):
        cost.observe(decodes(count, 500), 0.001 * count)
    for _ in range(4):
        for count in (0, 4, 32):
            for num_tokens in (50, 200, 1000):
                time = 0.01 + 1e-5 * num_tokens + share * 0.001 * count
                cost.observe(prompt(0, num_tokens, count), time)
    expected = 0.01 + 0.005 + share * 0.064
    assert cost.seconds(prompt(0, 500, 64)) == pytest.approx(expected, rel=0.05)


def test_long_contexts_of_decodes_are_predicted() -> None:
    """The time of decodes grows with their number and with their contexts."""
    cost = StepCost()
    for count in (1, 4, 16):
        for context in (100, 1000, 8000):
            cost.observe(decodes(count, context), 0.005 + 0.001 * count + 1e-7 * count * context)
    assert cost.seconds(decodes(8, 4000)) == pytest.approx(0.005 + 0.008 + 0.0032, rel=0.05)


def test_a_device_that_becomes_slower_is_noticed() -> None:
    """Twenty steps after everything takes four times as long, predictions have followed, also for
    a size that was not measured since."""
    cost = StepCost()
    for slowdown in (1, 4):
        for _ in range(10):
            for num_tokens in (64, 1024):
                cost.observe(prompt(0, num_tokens), slowdown * (0.01 + 1e-5 * num_tokens))
    assert cost.seconds(prompt(0, 512)) == pytest.approx(4 * (0.01 + 5.12e-3), rel=0.1)


@given(start=st.integers(0, 16_000), seconds=st.floats(0, 1), score=st.floats(0, 1e-6))
def test_as_many_tokens_are_chosen_as_fit(start: int, seconds: float, score: float) -> None:
    """`num_tokens` is the largest number whose `chunk_seconds` is within the time."""
    cost = StepCost()
    for chunk in (prompt(0, 100), prompt(0, 4000), prompt(8000, 100), prompt(8000, 4000)):
        cost.observe(chunk, 0.02 + 1e-4 * chunk.num_prompt_tokens + score * chunk.num_scores)
    fitting = cost.num_tokens(start, seconds)
    assert cost.chunk_seconds(start, fitting) <= seconds * 1.001 + 1e-9
    assert cost.chunk_seconds(start, fitting + 2) > seconds * 0.999


def test_few_prompt_tokens_are_predicted_apart() -> None:
    """If small steps have a small fixed part and a large rate, and large steps the opposite, both
    are predicted."""
    cost = StepCost(few_tokens=512)

    def seconds(num_tokens: int) -> float:
        few, many = 0.002 + 1e-4 * num_tokens, 0.05 + 2e-5 * num_tokens
        return few if num_tokens <= 512 else many

    for num_tokens in (16, 100, 400, 512):
        cost.observe(prompt(0, num_tokens), seconds(num_tokens))
    assert cost.seconds(prompt(0, 1000)) == pytest.approx(0.102, rel=0.05)
    for num_tokens in (600, 1000, 4000):
        cost.observe(prompt(0, num_tokens), seconds(num_tokens))
    for num_tokens in (30, 300, 700, 3000):
        assert cost.seconds(prompt(0, num_tokens)) == pytest.approx(seconds(num_tokens), rel=0.05)
        added = cost.chunk_seconds(0, num_tokens)
        assert added == pytest.approx(seconds(num_tokens) - 0.002, rel=0.05)
        assert cost.num_tokens(0, added) == pytest.approx(num_tokens, abs=2)


def test_a_time_that_is_flat_and_then_grows_is_predicted() -> None:
    """Where unpacking takes 47 ms beside products that take 33 us a token, whichever is longer
    counts; the line that is learned is within a fifth."""
    cost = StepCost()

    def seconds(num_tokens: int) -> float:
        return max(0.047, 33e-6 * num_tokens)

    for num_tokens in (600, 1000, 2000, 4000, 8000):
        cost.observe(prompt(0, num_tokens), seconds(num_tokens))
    for num_tokens in (500, 800, 1400, 3000, 6000):
        found = cost.seconds(prompt(0, num_tokens))
        assert found == pytest.approx(seconds(num_tokens), rel=0.2)


def test_nothing_is_predicted_before_the_first_step() -> None:
    """Predictions are 0 before the first measurement of their kind."""
    assert StepCost().seconds(prompt(0, 100)) == StepCost().seconds(decodes(1, 10)) == 0


def test_decodes_and_prompts_that_are_never_mixed_add_up() -> None:
    """If decodes and prefill chunks are separate steps, the time of both is the sum."""
    cost = StepCost()
    for count in (1, 4, 16):
        cost.observe(decodes(count, 500), 0.001 * count)
    for num_tokens in (50, 200, 1000):
        cost.observe(prompt(0, num_tokens), 0.01 + 1e-5 * num_tokens)
    assert cost.seconds(prompt(0, 400, num_decodes=8)) == pytest.approx(0.022, rel=0.05)


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns a list that gets the number of the last step at each fit."""
    numbers: list[int] = []
    fit = step_cost._LinearFit._fit

    def counted(self: step_cost._LinearFit) -> None:
        numbers.append(self._num_observed)
        fit(self)

    monkeypatch.setattr(step_cost._LinearFit, "_fit", counted)
    return numbers


@pytest.mark.parametrize("seed", range(5))
def test_noisy_times_of_short_steps_are_seldom_fitted(fits: list[int], seed: int) -> None:
    """If the times of steps of about 1 ms vary by a factor of four, the number of fits is bounded
    by the time of the steps, and the prediction is near their median."""
    draw = random.Random(seed)
    cost = StepCost()
    times = [0.001 * 4 ** draw.uniform(-0.5, 0.5) for _ in range(1000)]
    for seconds in times:
        cost.observe(decodes(16, 100), seconds)
        cost.seconds(decodes(16, 100))
    assert 10 < len(fits) <= 1 + sum(times) / step_cost.MIN_FITTED_S
    assert 0.0005 < cost.seconds(decodes(16, 100)) < 0.002


def test_short_steps_that_become_slower_are_soon_predicted(fits: list[int]) -> None:
    """If steps of 1 ms begin to take 3 ms, the prediction follows within ten of them."""
    cost = StepCost()
    for seconds in (*[0.001] * 100, *[0.003] * 10):
        cost.observe(decodes(16, 100), seconds)
        cost.seconds(decodes(16, 100))
    assert cost.seconds(decodes(16, 100)) == pytest.approx(0.003, rel=0.1)
    assert len(fits) <= 6


def test_steps_as_predicted_are_not_fitted_each(fits: list[int]) -> None:
    """Steps of 10 ms are fitted again after every 16th of them; a wrong prediction after a longer
    time without a fit is fitted at once."""
    cost = StepCost()

    def step(seconds: float) -> float:
        shape = StepShape(4, 1000, 0, 0)
        cost.observe(shape, seconds)
        return cost.seconds(shape)

    for _ in range(64):
        step(0.01)
    assert fits == [1, 17, 33, 49]
    for _ in range(8):
        learned = step(0.02)
    assert fits[4] == 65
    assert learned == pytest.approx(0.02, rel=0.1)
