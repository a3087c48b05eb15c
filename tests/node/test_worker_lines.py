"""The output of Ray's workers as lines of JSON."""

import json
import logging
from collections.abc import Iterator

import pytest
from ray._private import worker
from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher
from ray.serve._private.logging_utils import ServeFormatter

from serve_app.node import worker_lines


@pytest.fixture
def printed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Iterator[list[object]]:
    """What Ray's own handlers get after `write_as_json`."""
    printed: list[object] = []
    handlers = [(worker_lines.RAYS_HANDLER, printed.append)]
    monkeypatch.setattr(dispatcher, "handlers", handlers)
    monkeypatch.setattr(worker, "print_to_stdstream", worker.print_to_stdstream)
    for name in ("ray", "ray.serve"):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
    caplog.set_level(logging.INFO)
    worker_lines.write_as_json()
    yield printed
    assert printed == []


@pytest.mark.usefixtures("printed")
def test_a_workers_line_becomes_a_record_and_a_json_line_stays(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray's dispatcher calls our handler in place of its own: text is wrapped, JSON is not."""
    line = json.dumps({"time": "t", "message": "m"})
    dispatcher.emit({"lines": ["text", "", line], "pid": 7, "actor_name": "Proxy", "is_err": True})
    assert capsys.readouterr().err == f"{line}\n"
    (record,) = caplog.records
    assert record.getMessage() == "text"
    assert record.__dict__["fields"] == {"process": "Proxy", "pid": 7}


@pytest.mark.usefixtures("printed")
def test_a_record_of_serve_keeps_its_level(caplog: pytest.LogCaptureFixture) -> None:
    """A line that Serve's own formatter has written has the level with which it begins."""
    formatter = ServeFormatter("controller", "7")
    levels = [logging.INFO, logging.WARNING, logging.ERROR]
    made = [logging.LogRecord("s", level, "x.py", 1, "zebra", None, None) for level in levels]
    dispatcher.emit({"lines": [formatter.format(each) for each in made], "pid": 7})
    assert [record.levelno for record in caplog.records] == levels


@pytest.mark.usefixtures("printed")
def test_a_message_of_the_raylet_is_a_record(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray prints the death of a worker on standard output, in color."""
    data = {"lines": ["A worker died."], "pid": "raylet", "is_err": False}
    worker.print_to_stdstream(data, ignore_prefix=False)
    assert [record.getMessage() for record in caplog.records] == ["A worker died."]
    assert capsys.readouterr().out == ""
