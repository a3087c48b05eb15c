"""Log lines as JSON: what a line has, and where the setting takes effect."""

import io
import json
import logging
import logging.handlers
import sys
from datetime import UTC, datetime
from typing import Any

import pytest

from serve_app.config.log_format import JsonFormatter, use_json, use_log_format
from serve_app.errors import handle_error
from tests.worker.process import TINY

VARIABLE = "MIXTRAL_OBSERVABILITY__LOG_FORMAT"


def record(message: str, **attributes: Any) -> logging.LogRecord:
    made = logging.LogRecord("a.b", logging.WARNING, "x.py", 1, message, None, None)
    made.__dict__ |= attributes
    return made


def test_a_line_has_time_level_logger_message_and_the_records_fields() -> None:
    """A record is one JSON object, its time an RFC 3339 one in UTC, its text on one line."""
    text = JsonFormatter().format(record("two\nlines", created=0.25, fields={"seconds": 1.5}))
    assert "\n" not in text
    line = json.loads(text)
    assert datetime.fromisoformat(line.pop("time")) == datetime.fromtimestamp(0.25, UTC)
    expected = {"level": "WARNING", "logger": "a.b", "message": "two\nlines", "seconds": 1.5}
    assert line == expected


def test_our_request_id_goes_before_serves() -> None:
    """Serve names the replica; where both know the request's id, the line has ours."""
    serves = {"request_id": "the client's", "replica": "r1", "args": None}
    formatter = JsonFormatter()
    line = formatter.line(record("x", **serves, fields={"request_id": "ours"}))
    assert (line["request_id"], line["replica"]) == ("ours", "r1")
    assert formatter.line(record("x", **serves))["request_id"] == "the client's"


def test_an_exception_is_a_field_of_its_line() -> None:
    """A traceback does not break the line in two."""
    try:
        raise ValueError("zebra")
    except ValueError:
        text = JsonFormatter().format(record("x", exc_info=sys.exc_info()))
    assert "\n" not in text
    assert json.loads(text)["exception"].endswith("ValueError: zebra")


def test_a_failed_request_is_found_by_its_id_and_quotes_nobody() -> None:
    """The line of a bug has request id and error as fields, and no text of the exception."""
    stream = io.StringIO()
    inner = logging.StreamHandler(stream)
    outer = logging.handlers.MemoryHandler(1, target=inner)  # as Serve has it
    log = logging.getLogger("serve_app.errors")
    log.addHandler(outer)
    use_json([outer])
    try:
        handle_error(KeyError("zebra"), "request-7")
    finally:
        log.removeHandler(outer)
        outer.close()
    line = json.loads(stream.getvalue())
    assert (line["request_id"], line["error"]) == ("request-7", "KeyError")
    assert "zebra" not in stream.getvalue()


@pytest.mark.parametrize(("value", "is_json"), [("json", True), ("text", False), ("xml", False)])
def test_the_setting_chooses_the_format(
    value: str, is_json: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """json replaces the formatter of this process's handlers; text and a wrong value leave it."""
    monkeypatch.setenv(VARIABLE, value)
    handler = logging.StreamHandler(io.StringIO())
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    use_log_format(TINY)
    assert isinstance(handler.formatter, JsonFormatter) == is_json
