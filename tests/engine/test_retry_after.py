"""The Retry-After of a full queue follows the rate at which requests end."""

import pytest

from serve_app.engine.retry_after import MAX_FULL_S, MAX_S, UNMEASURED_FULL_S, Places, RetryAfter


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def measured(rate: float, min_s: int = 1) -> tuple[RetryAfter, Clock]:
    """Returns a `RetryAfter` that has seen 50 ends at `rate` a second, while others waited."""
    clock = Clock()
    retry_after = RetryAfter(min_s, clock)
    for _ in range(50):
        clock.now += 1 / rate
        retry_after.ended(is_saturated=True)
    return retry_after, clock


def test_without_a_measured_rate_the_setting_counts() -> None:
    """Before the first ends of requests, a refused request gets the minimum."""
    assert [RetryAfter(3, Clock()).next_s() for _ in range(5)] == [3] * 5


def test_refused_requests_get_their_turns_at_the_drain_rate() -> None:
    """100 requests refused at once, at 20 ends a second: 20 each in 1, 2, 3, 4 and 5 s."""
    retry_after, clock = measured(20.0)
    clock.now += 0.001  # rounding would push the 20th into the 2nd second
    told = [retry_after.next_s() for _ in range(99)]
    assert told == sorted(told)
    assert [told.count(seconds) for seconds in (1, 2, 3, 4)] in ([20] * 4, [19, 20, 20, 20])
    clock.now += 60
    assert retry_after.next_s() == 1


def test_the_wait_has_a_longest_and_a_shortest() -> None:
    """With a slow engine the value is at most MAX_S; with a fast one, at least the setting."""
    slow, _ = measured(0.01)
    assert slow.next_s() == MAX_S
    fast, _ = measured(1000.0, min_s=2)
    assert fast.next_s() == 2


def test_idle_time_is_not_measured() -> None:
    """Ten minutes without a request between two bursts do not make the engine look slow."""
    retry_after, clock = measured(20.0)
    retry_after.ended(is_saturated=False)
    clock.now += 600
    retry_after.ended(is_saturated=True)
    assert retry_after.next_s() == 1


def test_a_proxy_gets_the_measured_rate() -> None:
    """At 20 ends a second, 8 places become free in 0.4 s; slow engines are asked every second."""
    fast, slow = measured(20.0)[0], measured(0.5, min_s=2)[0]
    places = fast.places(288, 8)
    assert (places.num_places, places.min_s) == (288, 1)
    assert places[1:3] == pytest.approx((0.05, 0.4))
    assert fast.places(288, 0).full_s == pytest.approx(0.05)
    assert slow.places(10, 0)[1:] == pytest.approx((2.0, MAX_FULL_S, 2))
    assert RetryAfter(1, Clock()).places(10, 2) == Places(10, 0.0, UNMEASURED_FULL_S, 1)
