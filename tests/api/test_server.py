"""The server without HTTP: failures, deadlines, cancellation, draining. The engine is a fake."""

import asyncio
import logging
from typing import Any

import pytest

from serve_app.api.server import MixtralServer
from serve_app.config.settings import Settings
from serve_app.errors import QueueFull
from tests.fakes import FakeEngine, answer, items, server

CHAT = {"messages": [{"role": "user", "content": "Hello"}]}


def ask(path: str, body: Any, engine: FakeEngine | None = None, **args: Any) -> dict[str, Any]:
    """Returns the answer of a server made for this one request."""
    return asyncio.run(answer(server(engine, **args), path, body))


def test_a_refusal_of_the_engine_keeps_its_kind() -> None:
    """The status is the error's own, also for a stream, which sends no chunk."""
    for body in ({"prompt": "a"}, {"prompt": "a", "stream": True}):
        engine = FakeEngine("", error=QueueFull("The queue is full.", retry_after_s=3))
        (item,) = asyncio.run(items(server(engine), "/prompt", body))
        assert (item["status"], item["error"]["error"]["code"]) == (429, "queue_full")


def test_a_failure_in_the_middle_is_the_last_item() -> None:
    """An error follows the chunks that were sent; an unexpected one does not contain its text."""
    engine = FakeEngine(error=RuntimeError("secret"))
    *sent, last = asyncio.run(items(server(engine), "/prompt", {"prompt": "a", "stream": True}))
    assert sent
    assert all("chunk" in item for item in sent)
    assert (last["status"], last["error"]["error"]["code"]) == (500, "internal_error")
    assert "secret" not in str(last)


def test_an_unforeseen_failure_is_logged_with_its_id_and_no_text(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The log has the request id and the lines of code; neither prompt nor exception text."""
    with caplog.at_level(logging.INFO):
        ask("/prompt", {"prompt": "my words"}, FakeEngine(error=RuntimeError("my words")))
    assert "r1" in caplog.text
    assert "fakes.py" in caplog.text
    assert "my words" not in caplog.text


def test_the_deadline_ends_a_request() -> None:
    """After request_timeout_s the request fails with 504 and leaves the engine."""
    for body in ({"prompt": "a"}, {"prompt": "a", "stream": True}):
        engine = FakeEngine(is_endless=True)
        args = {"api": {"request_timeout_s": 0.05}}
        *_, last = asyncio.run(items(server(engine, **args), "/prompt", body))
        assert (last["status"], last["error"]["error"]["code"]) == (504, "timeout")
        assert engine.num_running == 0


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {**CHAT, "logprobs": True}),
        ("/v1/completions", {"prompt": "a", "logprobs": 1}),
    ],
)
def test_a_log_probability_that_is_no_number_is_an_error(
    path: str, body: Any, stream: bool
) -> None:
    """A NaN becomes an error, not null, which clients would read as a number."""
    engine = FakeEngine(logprob=float("nan"))
    *_, last = asyncio.run(items(server(engine), path, {**body, "stream": stream}))
    assert (last["status"], last["error"]["error"]["code"]) == (500, "internal_error")


@pytest.mark.parametrize("num_items", [1, 2, 5])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", {"prompt": ["a", "b"]}),
        ("/prompt", {"prompt": "a"}),
    ],
)
def test_closing_a_stream_frees_the_engine(path: str, body: Any, num_items: int) -> None:
    """A client that stops reading, after the first item or later, leaves nothing running."""
    engine = FakeEngine(is_endless=True)

    async def leave() -> None:
        call = server(engine).call("POST", path, {**body, "stream": True}, "r1")
        for _ in range(num_items):
            await anext(call)
        assert engine.num_running > 0
        await call.aclose()
        assert engine.num_running == 0

    asyncio.run(leave())


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", {"prompt": ["a", "b"]}),
        ("/prompt", {"prompts": ["a", "b"]}),
    ],
)
def test_cancelling_an_answer_frees_the_engine(path: str, body: Any) -> None:
    """A cancelled request, batches included, leaves nothing running."""
    engine = FakeEngine(is_endless=True)

    async def leave() -> None:
        task = asyncio.create_task(answer(server(engine), path, body))
        assert await asyncio.to_thread(engine.begun.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.num_running == 0

    asyncio.run(leave())


def test_closing_a_batch_frees_the_engine() -> None:
    """A batch job that is stopped after its first item leaves nothing running."""
    engine = FakeEngine(is_endless=True)

    async def leave() -> None:
        body = {"prompts": [{"wrong": 1}, "a", "b"]}
        call = server(engine).call("POST", "/prompt", body, "r1")
        await anext(call)
        assert await asyncio.to_thread(engine.begun.wait, 10)
        await call.aclose()
        assert engine.num_running == 0

    asyncio.run(leave())


def test_draining_finishes_what_runs_and_refuses_the_rest() -> None:
    """A running stream goes on; a new request is 503 with a time to come back; /ping is 503."""

    async def drain() -> None:
        one = server(FakeEngine())
        running = one.call("POST", "/prompt", {"prompt": "a", "stream": True}, "r1")
        await anext(running)
        one.drain()
        (refused,) = await items(one, "/prompt", {"prompt": "a"})
        assert (refused["status"], refused["error"]["error"]["code"]) == (503, "draining")
        ping = [item async for item in one.call("GET", "/ping", None, "r2")]
        assert ping == [{"status": 503, "body": {"status": "draining"}}]
        last: Any = [item async for item in running][-1]
        assert last["chunk"]["finish_reason"] == "stop"

    asyncio.run(drain())


def test_a_dead_engine_fails_health_checks_and_requests() -> None:
    """After the engine has died, Serve's health check raises and requests get `engine_dead`."""
    engine = FakeEngine()
    one = server(engine)
    one.check_health()
    engine.is_alive = False
    assert asyncio.run(answer(one, "/prompt", {"prompt": "a"}))["error"]["code"] == "engine_dead"
    with pytest.raises(Exception, match="engine has stopped"):
        one.check_health()


def test_a_drain_that_takes_too_long_answers_everyone() -> None:
    """Requests that run, or wait behind a full batch, get a 503; the replica does not count as
    dead, whose process would end before they have it."""
    settings = Settings.from_yaml("configs/tiny.yaml")
    small = settings.engine.model_copy(update={"max_num_seqs": 2})
    one = MixtralServer(settings.model_copy(update={"engine": small}))
    body = {"prompt": "a", "max_tokens": 4000, "ignore_eos": True}

    async def run() -> list[Any]:
        lists = {"prompts": ["a"] * 5, "max_tokens": 4000, "ignore_eos": True}
        asked = [asyncio.create_task(answer(one, "/prompt", each)) for each in [body] * 4 + [lists]]
        while one.health()["engine"]["running"] < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        one.drain()
        await asyncio.to_thread(one.end_requests)
        return [*await asyncio.gather(*asked)]

    *single, listed = asyncio.run(run())
    errors = [each["error"] for each in (*single, *listed["results"])]
    assert [error["code"] for error in errors] == ["draining"] * 9
    assert all(error["retry"] for error in errors)
    one.check_health()
