"""The handler's posts for an answered job, with a scripted model."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from serve_app.protocol.call import Call
from tests import virtual_time
from tests.worker.recorded import RecordedPosts, posts_of
from tests.worker.scripted_model import LAST, TOKENS, HandlerOf, Model

PLAIN = [
    {"prompt": "2 + 3"},
    {"endpoint": "/prompt", "data": {"prompt": "2 + 3"}},
    {"route": "/prompt", "body": {"prompt": "2 + 3", "stream": False}},
]


@pytest.mark.parametrize("given", PLAIN)
def test_a_plain_answer_is_the_output(handler_of: HandlerOf, given: Any) -> None:
    """The output of a job that does not stream is the object that HTTP would send."""
    model = Model([{"status": 200, "body": {"text": "5"}}])
    posts = posts_of(handler_of(model), given)
    assert posts.output == {"text": "5"}
    assert not posts.results[0].is_list
    assert model.calls[0].path == "/prompt"
    assert model.num_closed == 1


def test_the_gateway_gets_a_list_of_one(handler_of: HandlerOf) -> None:
    """Through RunPod's OpenAI gateway the output is a list of one object, posted as a chunk too."""
    model = Model([{"status": 200, "body": {"choices": []}}])
    posts = posts_of(
        handler_of(model), {"openai_route": "/v1/chat/completions", "openai_input": {"x": 1}}
    )
    assert posts.output == posts.chunks == [{"choices": []}]
    assert posts.results[0].is_list


def test_a_plain_stream_is_chunk_dicts(handler_of: HandlerOf) -> None:
    """A stream's text is in order, however it was merged, and its last chunk is on its own."""
    posts = posts_of(handler_of(Model([*TOKENS, {"chunk": LAST}])), {"prompt": "x", "stream": True})
    values = posts.output
    assert "".join(value["token"] for value in values) == "abc"
    assert values[-1] == LAST


def test_the_gateways_stream_is_sse_text_with_done(handler_of: HandlerOf) -> None:
    """The gateway's values are whole events, because it passes strings on unchanged."""
    chunks = [{"choices": [{"index": 0, "delta": {"content": text}}]} for text in "ab"]
    model = Model([{"chunk": chunk} for chunk in chunks])
    given = {"openai_route": "/v1/chat/completions", "openai_input": {"stream": True}}
    text = "".join(posts_of(handler_of(model), given).output)
    events = text.split("\n\n")
    assert [json.loads(event.removeprefix("data: ")) for event in events[:2]] == chunks
    assert events[2:] == ["data: [DONE]", ""]


def test_the_gateways_stream_ends_in_one_post(handler_of: HandlerOf) -> None:
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
    assert len(posts.output) == 2
    assert posts.output[1].endswith("data: [DONE]\n\n")


def test_done_follows_a_stream_that_ends_during_its_last_post(handler_of: HandlerOf) -> None:
    """[DONE] is posted too where the stream ends while its last event is being posted."""
    last = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    is_posting = asyncio.Event()

    async def model(call: Call) -> AsyncGenerator[Any, None]:
        yield {"chunk": last}
        await is_posting.wait()

    class SlowPosts(RecordedPosts):
        async def chunk(self, value: bytes) -> None:
            await super().chunk(value)
            is_posting.set()
            for _ in range(100):  # the post is under way
                await asyncio.sleep(0)

    posts = SlowPosts()
    given = {"openai_route": "/v1/chat/completions", "openai_input": {"stream": True}}
    asyncio.run(handler_of(model).answer({"id": "j", "input": given}, posts))
    assert len(posts.output) == 2
    assert posts.output[1] == "data: [DONE]\n\n"


def test_a_list_of_prompts_posts_progress(handler_of: HandlerOf) -> None:
    """A list of prompts posts its latest update at the interval, and then the result."""
    updates = [{"progress": done * 10, "message": f"{done} of 10 done"} for done in range(1, 11)]

    async def batch(call: Call) -> AsyncGenerator[Any, None]:
        for update in updates:
            yield {"progress": update}
            await asyncio.sleep(0.05)
        yield {"status": 200, "body": {"results": [], "total_processed": 0}}

    whole = {"results": [], "total_processed": 0}
    posts = RecordedPosts()
    job = {"id": "job-1", "input": {"prompts": ["x"]}}
    virtual_time.run(handler_of(batch).answer(job, posts))
    assert posts.output == whole
    shown = [update for update in posts.updates if "message" in update]
    assert 1 <= len(shown) < 10
    assert all(update in updates for update in shown)
    assert shown == sorted(shown, key=lambda update: update["progress"])


def test_a_stopped_job_closes_its_call_and_raises(handler_of: HandlerOf) -> None:
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


def test_a_job_that_is_cancelled_twice_ends_as_cancelled(handler_of: HandlerOf) -> None:
    """A second cancellation, while the call to the model closes, does not close it again."""

    async def scenario() -> None:
        begun, may_close, closed = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def batch(call: Call) -> AsyncGenerator[Any, None]:
            try:
                yield {"progress": {"progress": 10, "message": "1 of 10 done"}}
                begun.set()
                await asyncio.Event().wait()
            finally:
                await may_close.wait()
                closed.set()

        posts = RecordedPosts()
        answering = handler_of(batch).answer({"id": "j", "input": {"prompts": ["x"]}}, posts)
        task = asyncio.create_task(answering)
        await begun.wait()
        for _ in range(2):
            task.cancel()
            await asyncio.wait({task}, timeout=0.01)
        may_close.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        await closed.wait()
        assert posts.results == []

    asyncio.run(scenario())
