"""The limits of an API key by the minute."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.protocol.allowance import Allowance


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@given(
    per_minute=st.integers(1, 600),
    events=st.lists(st.tuples(st.floats(0, 30), st.integers(1, 20)), max_size=40),
)
def test_never_more_than_its_rate(per_minute: int, events: list[tuple[float, int]]) -> None:
    """A user who uses each available unit gets one full bucket and the refilled units in all; a
    user who waits for `wait_s` can use one."""
    clock = Clock()
    allowance = Allowance(per_minute, clock)
    num_used = 0
    for seconds, wanted in events:
        clock.now += seconds
        for _ in range(wanted):
            if allowance.wait_s() > 0:
                break
            allowance.use(1)
            num_used += 1
        assert num_used <= per_minute * (1 + clock.now / 60) + 1e-6
    clock.now += allowance.wait_s() + 1e-6
    assert allowance.left >= 1 - 1e-6


@given(st.integers(1, 10_000), st.integers(0, 20_000), st.floats(0, 100))
def test_headers_say_what_is_left(per_minute: int, num_used: int, seconds: float) -> None:
    """The reset, read as a duration of Go's, is when the bucket is full again."""
    clock = Clock()
    allowance = Allowance(per_minute, clock)
    allowance.use(num_used)
    clock.now += seconds
    headers = allowance.headers("tokens")
    assert headers["x-ratelimit-limit-tokens"] == str(per_minute)
    assert headers["x-ratelimit-remaining-tokens"] == str(max(0, math.floor(allowance.left)))
    found = re.fullmatch(r"(?:(\d+)m)?(\d+)(ms|s)", headers["x-ratelimit-reset-tokens"])
    assert found
    minutes, number, unit = found.groups()
    reset_s = int(minutes or 0) * 60 + int(number) / (1000 if unit == "ms" else 1)
    clock.now += reset_s
    assert allowance.left == pytest.approx(per_minute, rel=1e-6)
