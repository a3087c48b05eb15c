"""The lines of the log that say how many replicas are ready."""

import logging

import pytest

from serve_app.node import ready_replicas
from tests.worker.conftest import until


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line for name, _, line in caplog.record_tuples if name == ready_replicas.__name__]


def test_each_change_has_one_line(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number that stays the same is logged once; the last line says that all are ready. The first
    ready replica is reported once."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(ready_replicas, "POLL_S", 0.0)
    numbers = [0, 0, 1, 1, 2, 2]
    first = list[int]()

    def num_ready() -> int:
        return numbers.pop(0) if len(numbers) > 1 else numbers[0]

    with ready_replicas.logged(num_ready, 3, lambda: first.append(len(numbers))):
        until(lambda: len(numbers) == 1)
    assert first == [3]
    assert lines(caplog) == [
        "1 of 3 replicas are ready.",
        "2 of 3 replicas are ready.",
        "All 3 replicas are ready.",
    ]


def test_a_failed_load_is_not_ready(caplog: pytest.LogCaptureFixture) -> None:
    """If the deployment raises, no line says that all replicas are ready."""
    caplog.set_level(logging.INFO)
    with pytest.raises(RuntimeError), ready_replicas.logged(lambda: 1, 2):
        raise RuntimeError
    assert "All 2 replicas are ready." not in lines(caplog)


def test_one_replica_has_no_line(caplog: pytest.LogCaptureFixture) -> None:
    """The server's own line says that it is ready."""
    caplog.set_level(logging.INFO)
    with ready_replicas.logged(lambda: 1, 1):
        pass
    assert lines(caplog) == []
