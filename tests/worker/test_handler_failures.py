"""The handler's posts for a failed job, with a scripted model."""

import json
from typing import Any

import pytest

from serve_app.error_body import error_body
from serve_app.errors import EngineDead, InvalidRequest, ModelLoadFailed, QueueFull
from tests.worker.recorded import posts_of
from tests.worker.scripted_model import LAST, TOKENS, HandlerOf, Model


def test_an_error_body_passes_unchanged(handler_of: HandlerOf) -> None:
    """The job's error is the model's error body, as JSON text."""
    body = error_body(QueueFull("The queue is full."), "req-7")
    error = posts_of(handler_of(Model([{"status": 429, "error": body}])), {"prompt": "x"}).error
    assert {"error": error} == body
    assert error["status"] == "OVERLOADED"


@pytest.mark.parametrize("given", [None, {}, [], "text", {"nothing": 1}])
def test_bad_input_never_starts_the_model(given: Any, handler_of: HandlerOf) -> None:
    """A job that cannot be read is refused without a start of the model."""
    error = posts_of(handler_of(ModelLoadFailed("must not start")), given).error
    assert (error["status"], error["retry"]) == ("VALIDATION_FAILED", False)


def test_a_failed_stream_ends_with_its_error(handler_of: HandlerOf) -> None:
    """A failed stream ends with the error as a chunk, as clients do not see a job's error."""
    dead = EngineDead("The model's process ended.")
    posts = posts_of(handler_of(Model([*TOKENS, dead])), {"prompt": "x", "stream": True})
    assert "".join(chunk["token"] for chunk in posts.chunks) == "abc"
    assert posts.chunks[-1] == {
        "token": "",
        "finished": True,
        "finish_reason": "error",
        "status": "CONNECTION_ERROR",
        "retry": True,
        "message": "The model's process ended.",
    }
    assert posts.error["status"] == "CONNECTION_ERROR"


def test_the_gateway_gets_a_failure_as_an_event(handler_of: HandlerOf) -> None:
    """The gateway's stream ends with the error as an event, at which OpenAI's clients raise."""
    given = {"openai_input": {"stream": True, "messages": []}}
    posts = posts_of(handler_of(ModelLoadFailed("No such checkpoint.")), given)
    shown = json.loads(posts.chunks[0].removeprefix("data: "))
    assert shown == {"error": posts.error}
    assert shown["error"]["code"] == "model_load_failed"


def test_an_apis_own_event_for_an_error_ends_its_stream(handler_of: HandlerOf) -> None:
    """The Responses API's event ends the gateway's stream; the job fails with the error body."""
    body = error_body(InvalidRequest("No."), "req-7")
    last: Any = {"type": "error", "sequence_number": 4, "message": "No.", **body}
    model = Model([{"status": 400, "error": body, "event": last}])
    given = {"openai_route": "/v1/responses", "openai_input": {"stream": True}}
    posts = posts_of(handler_of(model), given)
    name, data = posts.chunks[0].strip().split("\n")
    assert (name, json.loads(data.removeprefix("data: "))) == ("event: error", last)
    assert posts.error == body["error"]


def test_a_failure_that_quotes_a_lone_surrogate_is_posted(
    handler_of: HandlerOf,
) -> None:
    """An error that quotes a lone surrogate, which no event can hold, is posted with U+FFFD."""
    body = error_body(InvalidRequest("There is no route /\ud800."), "req-7")
    model = Model([{"status": 404, "error": body}])
    given = {"openai_route": "/\ud800", "openai_input": {"stream": True}}
    posts = posts_of(handler_of(model), given)
    assert posts.chunks[0].startswith('data: {"error":{"message":"There is no route /')
    assert "no route" in posts.error["message"]


def test_a_job_that_posted_nothing_is_tried_once_more(
    handler_of: HandlerOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica that dies before the first value costs the job nothing, once."""
    monkeypatch.setattr("serve_app.worker.supervisor.CONFIRM_S", 0.01)
    dead = EngineDead("gone")
    once = Model([dead], [{"status": 200, "body": {"text": "ok"}}])
    assert posts_of(handler_of(once), {"prompt": "x"}).output == {"text": "ok"}
    twice = Model([dead], [dead])
    assert posts_of(handler_of(twice), {"prompt": "x"}).error["status"] == "CONNECTION_ERROR"
    assert len(twice.calls) == 2


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_dead_engine_is_a_dead_model(
    handler_of: HandlerOf, is_stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dead engine in a living replica makes the job be tried once more."""
    monkeypatch.setattr("serve_app.worker.supervisor.CONFIRM_S", 0.01)
    dead = {"status": 503, "error": error_body(EngineDead("The engine has stopped."), "req-7")}
    model = Model(
        [dead], [{"chunk": LAST}] if is_stream else [{"status": 200, "body": {"text": ""}}]
    )
    posts = posts_of(handler_of(model), {"prompt": "x", "stream": is_stream})
    assert posts.output == ([LAST] if is_stream else {"text": ""})


def test_a_job_that_has_posted_is_not_repeated(handler_of: HandlerOf) -> None:
    """A job that has posted a value is not tried again: the client would read it twice."""
    model = Model([*TOKENS, EngineDead("gone")])
    posts_of(handler_of(model), {"prompt": "x", "stream": True})
    assert len(model.calls) == 1


def test_a_bug_shows_nothing_of_itself(
    handler_of: HandlerOf, caplog: pytest.LogCaptureFixture
) -> None:
    """A bug gives the client a request id; the log has the place of the error with the same id."""
    error = posts_of(handler_of(Model([RuntimeError("/home/secret")])), {"prompt": "x"}).error
    assert error["status"] == "UNKNOWN_ERROR"
    assert "secret" not in json.dumps(error)
    assert f"{error['request_id']} failed: RuntimeError in __call__" in caplog.text
    assert "secret" not in caplog.text


def test_an_answer_that_is_no_json_is_an_error(handler_of: HandlerOf) -> None:
    """An answer with NaN fails the job; the SDK would post it as invalid JSON."""
    model = Model([{"status": 200, "body": {"logprob": float("nan")}}])
    assert posts_of(handler_of(model), {"prompt": "x"}).error["status"] == "UNKNOWN_ERROR"


def test_an_answer_without_a_body_is_an_error(handler_of: HandlerOf) -> None:
    """An answer that ends without a body fails the job."""
    assert posts_of(handler_of(Model([])), {"prompt": "x"}).error["status"] == "UNKNOWN_ERROR"
