"""The log lines of jobs, as text and as JSON."""

import json
import logging
from collections.abc import Iterator

import pytest

from serve_app.error_body import error_body
from serve_app.errors import (
    InvalidRequest,
    ModelNotFound,
    OutOfMemory,
    QueueFull,
    ServeError,
)
from serve_app.worker import job_log
from serve_app.worker.job_log import FullJsonLines, JsonLines, running_job
from tests.worker.recorded import posts_of
from tests.worker.scripted_model import HandlerOf, Model


@pytest.fixture
def in_job() -> Iterator[None]:
    """Code that runs for the job "job-1"."""
    token = running_job.set("job-1")
    yield
    running_job.reset(token)


def test_a_job_has_a_line_for_its_start_and_its_end(
    handler_of: HandlerOf, caplog: pytest.LogCaptureFixture
) -> None:
    """An answered job is logged as started, and as completed with its seconds."""
    caplog.set_level("INFO")
    posts_of(handler_of(Model([{"status": 200, "body": {"text": ""}}])), {"prompt": "x"})
    started, completed = (record for record in caplog.records if "Job " in record.message)
    assert started.message.startswith("Job started: job-1 (request ")
    assert completed.message.startswith("Job completed: job-1 in 0.")
    assert completed.message.endswith(" s")


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (OutOfMemory("The GPU ran out of memory."), "OOM_ERROR: The GPU ran out of memory."),
        (QueueFull("The queue is full."), "OVERLOADED: The queue is full."),
        (InvalidRequest("`temperature` is 3.", param="temperature"), "`temperature` is refused"),
        (ModelNotFound("There is no model `zebra`.", param="model"), "`model` is refused"),
        (InvalidRequest("`zebra` is no field.", param="zebra"), "VALIDATION_FAILED: the request"),
        (InvalidRequest("zebra", param="messages.0.role"), "`messages` is refused"),
    ],
)
def test_a_failure_is_an_error_with_its_cause(
    error: ServeError, cause: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A failure is at ERROR with its cause; what may quote the user is left out."""
    job_log.failed("job-1", 0.5, error_body(error, "request-7"))
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert record.message.startswith("Job failed: job-1 in 0.50 s (request request-7) - ")
    assert cause in record.message
    assert "zebra" not in record.message


@pytest.mark.usefixtures("in_job")
@pytest.mark.parametrize(
    ("level", "name"), [("INFO", "INFO"), ("WARNING", "WARN"), ("CRITICAL", "ERROR")]
)
def test_a_line_of_json_is_like_the_sdks(level: str, name: str) -> None:
    """A line has the keys and the names of levels that the SDK's own lines have."""
    number = logging.getLevelNamesMapping()[level]
    record = logging.LogRecord("x", number, "x.py", 1, 'said "%s"\n', ("ü",), None)
    line = JsonLines().format(record)
    assert "\n" not in line
    expected = {"requestId": "job-1", "message": 'said "ü"\n', "level": name}
    assert json.loads(line) == expected


@pytest.mark.usefixtures("in_job")
def test_with_the_setting_a_line_has_the_sdks_keys_and_all_fields(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """`log_format: json` adds time, logger and fields to what RunPod's console reads."""
    job_log.failed("job-1", 0.5, error_body(OutOfMemory("Full."), "request-7"))
    (record,) = caplog.records
    line = json.loads(FullJsonLines().format(record))
    assert (line["requestId"], line["level"]) == ("job-1", "ERROR")
    assert (line["request_id"], line["seconds"]) == ("request-7", 0.5)
    assert (line["status"], line["logger"]) == ("OOM_ERROR", "serve_app.worker.job_log")


def test_the_sdk_writes_such_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The SDK's line about a job has the same keys in the same order."""
    monkeypatch.setenv("RUNPOD_LOG_LEVEL", "INFO")
    monkeypatch.setenv("RUNPOD_ENDPOINT_ID", "ep")
    from runpod.serverless.modules.rp_logger import RunPodLogger

    logger = RunPodLogger()
    monkeypatch.setattr(logger, "level", "INFO")
    logger.warn("said", "job-1")
    record = logging.LogRecord("x", logging.WARNING, "x.py", 1, "said", None, None)
    token = running_job.set("job-1")
    ours = JsonLines().format(record)
    running_job.reset(token)
    assert capsys.readouterr().out == f"{ours}\n"
