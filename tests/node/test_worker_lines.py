"""The output of Ray's workers as lines of JSON."""

import json
import logging
import sys
from collections.abc import Iterator

import pytest
from ray._common.formatters import JSONFormatter
from ray._private import worker
from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher

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
def test_a_record_of_serve_keeps_its_level_and_its_lines(caplog: pytest.LogCaptureFixture) -> None:
    """A record in JSON, as Serve's controller writes it, is one record; a part of one is text."""
    try:
        raise ValueError("zebra")
    except ValueError:
        made = logging.LogRecord("s", logging.ERROR, "x.py", 1, "one\ntwo", None, sys.exc_info())
    line = JSONFormatter().format(made)
    dispatcher.emit({"lines": [line, line[:60]], "pid": 7, "actor_name": "Controller"})
    whole, part = caplog.records
    assert (whole.levelname, whole.getMessage()) == ("ERROR", "one\ntwo")
    assert whole.__dict__["fields"]["exception"].endswith("ValueError: zebra")
    assert part.getMessage() == line[:60]


@pytest.mark.usefixtures("printed")
def test_a_message_of_the_raylet_is_a_record(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray prints the death of a worker on standard output, in color."""
    data = {"lines": ["A worker died."], "pid": "raylet", "is_err": False}
    worker.print_to_stdstream(data, ignore_prefix=False)
    assert [record.getMessage() for record in caplog.records] == ["A worker died."]
    assert capsys.readouterr().out == ""
