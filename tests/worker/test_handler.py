"""The handler with a scripted model: what it posts for every way in which a job can end."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import pytest

from serve_app.errors import EngineDead, InvalidRequest, ModelLoadFailed, QueueFull, error_body
from serve_app.node.client import Forward
from serve_app.protocol.call import Call
from serve_app.worker.handler import Handler
from serve_app.worker.supervisor import StartupSupervisor
from tests.exposition import Shown
from tests.worker.recorded import RecordedPosts

Items = list[dict[str, Any] | Exception]


class Model:
    """Answers each call with the next of `scripts`, and records the calls."""

    def __init__(self, *scripts: Items) -> None:
        self.scripts = list(scripts)
        self.calls: list[Call] = []
        self.num_closed = 0

    async def __call__(self, call: Call) -> AsyncGenerator[Any, None]:
        self.calls.append(call)
        try:
            for item in self.scripts.pop(0):
                if isinstance(item, Exception):
                    raise item
                yield item
                await asyncio.sleep(0)
        finally:
            self.num_closed += 1


@pytest.fixture
def handler_of(tmp_path: Path) -> Callable[..., Handler]:
    def make(model: Forward | Exception) -> Handler:
        async def start() -> Forward:
            await asyncio.sleep(0.01)
            if isinstance(model, Exception):
                raise model
            return model

        return Handler(
            StartupSupervisor(start),
            load_log=str(tmp_path / "load.jsonl"),
            progress_interval_s=0.1,
            max_body_bytes=10**6,
            model_name="tiny",
        )

    return make


def posts_of(handler: Handler, given: Any) -> RecordedPosts:
    """All that is posted for a job with the input `given`."""
    posts = RecordedPosts()
    asyncio.run(handler.answer({"id": "job-1", "input": given}, posts))
    return posts


def run(handler: Handler, given: Any) -> list[Any]:
    """The values of its output, then the error of a job that fails."""
    return posts_of(handler, given).values


def error_of(values: list[Any]) -> dict[str, Any]:
    """The failed job's error, which must be one JSON string and the last value."""
    assert list(values[-1]) == ["error"]
    assert isinstance(values[-1]["error"], str)
    error: dict[str, Any] = json.loads(values[-1]["error"])["error"]
    assert error.keys() == {"message", "type", "param", "code", "status", "retry", "request_id"}
    return error


TOKENS: Items = [{"chunk": {"token": t, "finished": False}} for t in "abc"]
LAST = {"token": "", "finished": True, "finish_reason": "stop", "usage": {"total_tokens": 4}}


def test_a_plain_answer_is_one_value(handler_of: Callable[..., Handler]) -> None:
    """An answer that is no stream is one value: the object that HTTP would send."""
    model = Model([{"status": 200, "body": {"text": "5"}}])
    assert run(handler_of(model), {"prompt": "2 + 3"}) == [{"text": "5"}]
    assert model.calls[0].path == "/prompt"
    assert model.num_closed == 1


def test_a_plain_stream_is_chunk_dicts(handler_of: Callable[..., Handler]) -> None:
    """A stream's text is in order, however it was merged, and its last chunk is on its own."""
    values = run(handler_of(Model([*TOKENS, {"chunk": LAST}])), {"prompt": "x", "stream": True})
    assert "".join(value["token"] for value in values) == "abc"
    assert values[-1] == LAST


def test_the_gateways_stream_is_sse_text_with_done(handler_of: Callable[..., Handler]) -> None:
    """The gateway's values are whole events, because it passes strings on unchanged."""
    chunks = [{"choices": [{"index": 0, "delta": {"content": text}}]} for text in "ab"]
    model = Model([{"chunk": chunk} for chunk in chunks])
    given = {"openai_route": "/v1/chat/completions", "openai_input": {"stream": True}}
    text = "".join(run(handler_of(model), given))
    events = text.split("\n\n")
    assert [json.loads(event.removeprefix("data: ")) for event in events[:2]] == chunks
    assert events[2:] == ["data: [DONE]", ""]


def test_the_gateways_stream_ends_in_one_post(handler_of: Callable[..., Handler]) -> None:
    """Everything that comes while the first post is under way, [DONE] too, is one post."""
    chunks = [{"choices": [{"index": 0, "delta": {"content": text}}]} for text in "abc"]
    last = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    model = Model([{"chunk": chunk} for chunk in [*chunks, last]])
    given = {"openai_route": "/v1/chat/completions", "openai_input": {"stream": True}}

    class SlowPosts(RecordedPosts):
        async def chunk(self, value: bytes) -> None:
            await super().chunk(value)
            for _ in range(100):  # the post is under way
                await asyncio.sleep(0)
            assert model.num_closed

    posts = SlowPosts()
    asyncio.run(handler_of(model).answer({"id": "j", "input": given}, posts))
    assert len(posts.values) == 2
    assert posts.values[1].endswith("data: [DONE]\n\n")


def test_an_error_body_passes_unchanged(handler_of: Callable[..., Handler]) -> None:
    """The job's error is the model's error body, as JSON text."""
    body = error_body(QueueFull("The queue is full."), "req-7")
    values = run(handler_of(Model([{"status": 429, "error": body}])), {"prompt": "x"})
    assert json.loads(values[0]["error"]) == body
    assert error_of(values)["status"] == "OVERLOADED"


@pytest.mark.parametrize("given", [None, {}, [], "text", {"nothing": 1}])
def test_bad_input_never_starts_the_model(given: Any, handler_of: Callable[..., Handler]) -> None:
    """A job that cannot be read is refused without a start of the model."""
    values = run(handler_of(ModelLoadFailed("must not start")), given)
    assert error_of(values)["status"] == "VALIDATION_FAILED"
    assert not error_of(values)["retry"]


def test_a_failed_stream_ends_with_its_error(handler_of: Callable[..., Handler]) -> None:
    """A failed stream ends with the error as a chunk, as clients do not see a job's error."""
    dead = EngineDead("The model's process ended.")
    values = run(handler_of(Model([*TOKENS, dead])), {"prompt": "x", "stream": True})
    assert "".join(value["token"] for value in values[:-1]) == "abc"
    assert values[-2] == {
        "token": "",
        "finished": True,
        "finish_reason": "error",
        "status": "CONNECTION_ERROR",
        "retry": True,
        "message": "The model's process ended.",
    }
    assert error_of(values)["status"] == "CONNECTION_ERROR"


def test_the_gateway_gets_a_failure_as_an_event(handler_of: Callable[..., Handler]) -> None:
    """The gateway's stream ends with the error as an event, at which OpenAI's clients raise."""
    given = {"openai_input": {"stream": True, "messages": []}}
    values = run(handler_of(ModelLoadFailed("No such checkpoint.")), given)
    shown = json.loads(values[0].removeprefix("data: "))
    assert shown == json.loads(values[1]["error"])
    assert shown["error"]["code"] == "model_load_failed"


def test_a_failure_that_quotes_a_lone_surrogate_is_posted(
    handler_of: Callable[..., Handler],
) -> None:
    """An error that quotes a lone surrogate, which no event can hold, is posted with U+FFFD."""
    body = error_body(InvalidRequest("There is no route /\ud800."), "req-7")
    model = Model([{"status": 404, "error": body}])
    given = {"openai_route": "/\ud800", "openai_input": {"stream": True}}
    last, error = run(handler_of(model), given)
    assert last.startswith('data: {"error":{"message":"There is no route /')
    assert "no route" in error["error"]


def test_a_job_that_posted_nothing_is_tried_once_more(
    handler_of: Callable[..., Handler], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica that dies before the first value costs the job nothing, once."""
    monkeypatch.setattr("serve_app.worker.supervisor.CONFIRM_S", 0.01)
    dead = EngineDead("gone")
    once = Model([dead], [{"status": 200, "body": {"text": "ok"}}])
    assert run(handler_of(once), {"prompt": "x"}) == [{"text": "ok"}]
    twice = Model([dead], [dead])
    assert error_of(run(handler_of(twice), {"prompt": "x"}))["status"] == "CONNECTION_ERROR"
    assert len(twice.calls) == 2


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_dead_engine_is_a_dead_model(
    handler_of: Callable[..., Handler], is_stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dead engine in a living replica makes the job be tried once more."""
    monkeypatch.setattr("serve_app.worker.supervisor.CONFIRM_S", 0.01)
    dead = {"status": 503, "error": error_body(EngineDead("The engine has stopped."), "req-7")}
    model = Model(
        [dead], [{"chunk": LAST}] if is_stream else [{"status": 200, "body": {"text": ""}}]
    )
    values = run(handler_of(model), {"prompt": "x", "stream": is_stream})
    assert values == [LAST if is_stream else {"text": ""}]


def test_a_job_that_has_posted_is_not_repeated(handler_of: Callable[..., Handler]) -> None:
    """A job that has posted a value is not tried again: the client would read it twice."""
    model = Model([*TOKENS, EngineDead("gone")])
    run(handler_of(model), {"prompt": "x", "stream": True})
    assert len(model.calls) == 1


def test_a_bug_shows_nothing_of_itself(
    handler_of: Callable[..., Handler], caplog: pytest.LogCaptureFixture
) -> None:
    """A bug gives the client a request id; the log has the place of the error with the same id."""
    error = error_of(run(handler_of(Model([RuntimeError("/home/secret")])), {"prompt": "x"}))
    assert error["status"] == "UNKNOWN_ERROR"
    assert "secret" not in json.dumps(error)
    assert f"{error['request_id']} failed: RuntimeError in __call__" in caplog.text
    assert "secret" not in caplog.text


def test_an_answer_that_is_no_json_is_an_error(handler_of: Callable[..., Handler]) -> None:
    """An answer with NaN fails the job; the SDK would post it as invalid JSON."""
    model = Model([{"status": 200, "body": {"logprob": float("nan")}}])
    assert error_of(run(handler_of(model), {"prompt": "x"}))["status"] == "UNKNOWN_ERROR"


def test_health_is_answered_without_starting_the_model(handler_of: Callable[..., Handler]) -> None:
    """`/health` is idle before the first job, failed with a reason after it, else the model's."""
    cold = handler_of(ModelLoadFailed("No such checkpoint."))
    assert run(cold, {"endpoint": "/health"}) == [{"status": "idle", "load": []}]
    run(cold, {"prompt": "x"})
    failed = {"status": "failed", "load": [], "reason": "No such checkpoint."}
    assert run(cold, {"openai_route": "/health"}) == [failed]
    warm = handler_of(
        Model(
            [{"status": 200, "body": {"text": ""}}], [{"status": 200, "body": {"status": "ready"}}]
        )
    )
    run(warm, {"prompt": "x"})
    assert run(warm, {"route": "/health"}) == [{"status": "ready"}]
    posted = error_of(run(cold, {"route": "/health", "method": "POST"}))
    assert posted["status"] == "VALIDATION_FAILED"


def test_metrics_are_answered_without_starting_the_model(
    handler_of: Callable[..., Handler],
) -> None:
    """`/metrics` has the worker's status before a model is ready, then the model's text."""
    cold = handler_of(ModelLoadFailed("No such checkpoint."))
    for given, status in (
        ({"route": "/metrics"}, "idle"),
        ({"openai_route": "/metrics"}, "failed"),
    ):
        (text,) = run(cold, given)
        assert Shown(text).by("status", "status") == {status: 1}
        run(cold, {"prompt": "x"})
    warm = handler_of(
        Model([{"status": 200, "body": {"text": ""}}], [{"status": 200, "body": "# A text.\n"}])
    )
    run(warm, {"prompt": "x"})
    assert run(warm, {"endpoint": "/metrics"}) == ["# A text.\n"]
    posted = error_of(run(cold, {"route": "/metrics", "method": "POST"}))
    assert posted["message"] == "/metrics takes GET, not POST."


def test_waiting_jobs_get_the_phases_of_the_load(
    handler_of: Callable[..., Handler], tmp_path: Path
) -> None:
    """A waiting job's first update has the status and the phases of the load."""
    (tmp_path / "load.jsonl").write_text('{"phase": "read", "state": "started", "at": 1}\n')
    posts = posts_of(handler_of(Model([{"status": 200, "body": {}}])), {"prompt": "x"})
    assert posts.updates[0] == {"status": "loading", "load": [], "phase": "read"}


def test_a_list_of_prompts_posts_progress(handler_of: Callable[..., Handler]) -> None:
    """A list of prompts posts its latest update at the interval, and then the result."""
    updates = [{"progress": done * 10, "message": f"{done} of 10 done"} for done in range(1, 11)]

    async def batch(call: Call) -> AsyncGenerator[Any, None]:
        for update in updates:
            yield {"progress": update}
            await asyncio.sleep(0.05)
        yield {"status": 200, "body": {"results": [], "total_processed": 0}}

    whole = [{"results": [], "total_processed": 0}]
    posts = posts_of(handler_of(batch), {"prompts": ["x"]})
    assert posts.values == whole
    shown = [update for update in posts.updates if "message" in update]
    assert 1 <= len(shown) < 10
    assert all(update in updates for update in shown)
    assert shown == sorted(shown, key=lambda update: update["progress"])


def test_a_stopped_job_closes_its_call_and_raises(handler_of: Callable[..., Handler]) -> None:
    """Cancelling a job closes its call, posts nothing, and is raised again."""

    async def scenario() -> None:
        started, closed = asyncio.Event(), asyncio.Event()

        async def endless(call: Call) -> AsyncGenerator[Any, None]:
            try:
                yield TOKENS[0]
                started.set()
                await asyncio.Event().wait()
            finally:
                closed.set()

        handler = handler_of(endless)

        posts = RecordedPosts()
        job = {"id": "j", "input": {"prompt": "x", "stream": True}}
        task = asyncio.create_task(handler.answer(job, posts))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert closed.is_set()
        assert posts.results == []

    asyncio.run(scenario())


def test_an_answer_without_a_body_is_an_error(handler_of: Callable[..., Handler]) -> None:
    """An answer that ends without a body fails the job."""
    assert error_of(run(handler_of(Model([])), {"prompt": "x"}))["status"] == "UNKNOWN_ERROR"
