"""The output of Ray's workers as lines of JSON."""

import json
import logging

import pytest
from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher

from serve_app.node import worker_lines


def test_a_workers_line_becomes_a_record_and_a_json_line_stays(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ray's dispatcher calls our handler in place of its own: text is wrapped, JSON is not."""
    printed: list[object] = []
    handlers = [(worker_lines.RAYS_HANDLER, printed.append)]
    monkeypatch.setattr(dispatcher, "handlers", handlers)
    for name in ("ray", "ray.serve"):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
    caplog.set_level(logging.INFO)
    worker_lines.write_as_json()
    line = json.dumps({"time": "t", "message": "m"})
    dispatcher.emit({"lines": ["text", "", line], "pid": 7, "actor_name": "Proxy", "is_err": True})
    assert printed == []
    assert capsys.readouterr().err == f"{line}\n"
    (record,) = caplog.records
    assert record.getMessage() == "text"
    assert record.__dict__["fields"] == {"process": "Proxy", "pid": 7}
