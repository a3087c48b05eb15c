"""The handler's posts for a failed job, with a scripted model."""

import asyncio
import json
from typing import Any

import pytest
from openai.types.responses import ResponseStreamEvent

from serve_app.error_body import error_body
from serve_app.errors import Draining, EngineDead, InvalidRequest, ModelLoadFailed, QueueFull
from tests.validated import validated
from tests.worker.recorded import RecordedPosts, posts_of
from tests.worker.scripted_model import LAST, TOKENS, HandlerOf, Items, Model


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


@pytest.mark.parametrize("is_in_the_replica", [True, False])
@pytest.mark.parametrize("num_events", [0, 3])
def test_a_dead_model_ends_a_response_with_its_own_event(
    handler_of: HandlerOf,
    num_events: int,
    is_in_the_replica: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The gateway's stream of a response ends with OpenAI's event `error` in sequence, whether the
    engine or its whole process died, and before or after the first event."""
    monkeypatch.setattr("serve_app.worker.supervisor.CONFIRM_S", 0.01)
    dead = EngineDead("The engine has stopped.")
    last: Any = {"status": 503, "error": error_body(dead, "req-7")} if is_in_the_replica else dead
    events: Items = [
        {"chunk": {"type": "response.output_text.delta", "delta": "a", "sequence_number": number}}
        for number in range(num_events)
    ]
    given = {"openai_route": "/v1/responses", "openai_input": {"stream": True}}
    posts = posts_of(handler_of(Model([*events, last], [last])), given)
    name, data = posts.chunks[-1].strip().split("\n")[-2:]
    shown = json.loads(data.removeprefix("data: "))
    assert (name, {"error": shown.pop("error")}) == ("event: error", {"error": posts.error})
    event: Any = validated(ResponseStreamEvent, shown)
    assert (event.type, event.message) == ("error", dead.message)
    assert (event.code, event.sequence_number) == ("engine_dead", num_events)


@pytest.mark.parametrize("is_in_the_replica", [True, False])
def test_a_dead_model_ends_a_message_with_its_own_event(
    handler_of: HandlerOf, is_in_the_replica: bool
) -> None:
    """The gateway's stream of a message ends with Anthropic's event `error`."""
    dead = EngineDead("The engine has stopped.")
    item: Any = {"status": 503, "error": error_body(dead, "req-7", "/v1/messages")}
    model = Model([{"chunk": {"type": "ping"}}, item if is_in_the_replica else dead])
    given = {"openai_route": "/v1/messages", "openai_input": {"stream": True}}
    posts = posts_of(handler_of(model), given)
    name, data = posts.chunks[-1].strip().split("\n")[-2:]
    shown = json.loads(data.removeprefix("data: "))
    assert (name, shown["type"], shown["error"]) == ("event: error", "error", posts.error)
    assert shown["error"]["type"] == "api_error"


def test_a_job_that_is_cut_keeps_its_id_and_the_order_of_its_events(handler_of: HandlerOf) -> None:
    """A stream that a drain cuts ends in sequence; its error has the id of the call and its
    chunks."""
    event = {"type": "response.output_text.delta", "delta": "a", "sequence_number": 6}
    model = Model([{"chunk": event}, {"wait": None}])
    handler, posts = handler_of(model), RecordedPosts()
    given = {"openai_route": "/v1/responses", "openai_input": {"stream": True}}
    job = {"id": "job-1", "input": given}

    async def cut() -> None:
        task = asyncio.create_task(handler.answer(job, posts))
        while not posts.encoded:  # noqa: ASYNC110
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        await handler.refuse(job, posts, Draining("The worker is stopping."))

    asyncio.run(cut())
    shown = json.loads(posts.chunks[-1].split("data: ")[1])
    assert (shown["sequence_number"], shown["code"]) == (7, "draining")
    (call,) = model.calls
    assert posts.error["request_id"] == shown["error"]["request_id"] == call.request_id


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
