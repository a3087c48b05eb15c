"""Pauses after failures in a row."""

from serve_app.worker.backoff import Backoff


def test_pauses_double_up_to_a_limit() -> None:
    """0.5 s, then twice as long each time, up to 15 s, however long the outage lasts."""
    backoff = Backoff()
    assert [backoff.failed() for _ in range(7)] == [0.5, 1, 2, 4, 8, 15, 15]
    for _ in range(2000):
        backoff.failed()
    assert backoff.failed() == 15


def test_a_success_starts_anew() -> None:
    """After `reset` the next failure is the first one again."""
    backoff = Backoff()
    backoff.failed()
    backoff.failed()
    assert backoff.num_failures == 2
    assert backoff.reset() >= 0
    assert (backoff.num_failures, backoff.failed()) == (0, 0.5)
