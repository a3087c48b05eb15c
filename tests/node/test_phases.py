"""The summary of a load's phases for clients."""

from serve_app.loading.phases import Done, Phase, Running, Started
from serve_app.node import phases


def test_clients_hear_finished_phases_and_the_one_under_way() -> None:
    """The summary has the seconds of finished phases and the progress of the current one."""
    started = Started(phase=Phase.READ, at=1.0)
    done = Done(phase=Phase.TOKENIZER, seconds=1.5)
    running = Running(phase=Phase.READ, done=0.4)
    load = [{"phase": "tokenizer", "seconds": 1.5}]
    assert phases.summary([]) == {"load": []}
    assert phases.summary([done]) == {"load": load}
    assert phases.summary([done, started]) == {"load": load, "phase": "read"}
    far = {"done": 0.4, "progress": 40}
    assert phases.summary([done, started, running]) == {
        "load": load,
        "phase": "read",
        "message": "read: 40 %",
        **far,
    }
    summary = phases.summary(
        [done, started, Running(phase=Phase.READ, done=0.4, bytes=25_200_000_000)]
    )
    assert summary == {
        "load": load,
        "phase": "read",
        "message": "read: 40 %, 10.08 of 25.20 GB",
        **far,
    }
