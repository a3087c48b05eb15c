"""Merging what came during a post, without delaying, losing or reordering anything."""

import asyncio
import json
import math
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from serve_app.errors import InternalError
from serve_app.worker.delivery import MAX_POST_BYTES, batches, merge_chunks, merge_text, postable


def token(text: str) -> dict[str, Any]:
    return {"token": text, "finished": False}


def chat(delta: dict[str, Any], **choice: Any) -> dict[str, Any]:
    return {"id": "c", "choices": [{"index": 0, "delta": delta, "finish_reason": None, **choice}]}


def test_the_first_item_is_not_held_back() -> None:
    """The first token is posted while the model still works on the second."""

    async def scenario() -> None:
        second = asyncio.Event()

        async def items() -> AsyncGenerator[dict[str, Any], None]:
            yield {"n": 1}
            await second.wait()
            yield {"n": 2}

        stream = batches(items())
        assert await anext(stream) == [{"n": 1}]
        second.set()
        assert [batch async for batch in stream] == [[{"n": 2}]]

    asyncio.run(scenario())


def test_what_comes_during_a_post_is_one_batch() -> None:
    """The model runs on while a post is under way; the next batch is all it said meanwhile."""

    async def scenario() -> None:
        said_all = asyncio.Event()

        async def items() -> AsyncGenerator[dict[str, Any], None]:
            for n in range(100):
                yield {"n": n}
                await asyncio.sleep(0)
            said_all.set()

        stream = batches(items())
        first = await anext(stream)
        await said_all.wait()  # the consumer is busy with its post
        rest = await anext(stream)
        assert first + rest == [{"n": n} for n in range(100)]
        assert len(first) == 1
        assert [batch async for batch in stream] == []

    asyncio.run(scenario())


def test_a_failure_comes_after_what_was_said_before_it() -> None:
    """Items that were there before the stream broke are delivered, then the error is raised."""

    async def scenario() -> list[Any]:
        async def items() -> AsyncGenerator[dict[str, Any], None]:
            yield {"n": 1}
            yield {"n": 2}
            raise InternalError("broken")

        seen: list[Any] = []

        async def read() -> None:
            async for batch in batches(items()):
                seen.extend(batch)

        with pytest.raises(InternalError, match="broken"):
            await read()
        return seen

    assert asyncio.run(scenario()) == [{"n": 1}, {"n": 2}]


def test_leaving_closes_the_source() -> None:
    """Closing, and the end of a task that never closed it, both cancel the request."""

    async def scenario(close: bool) -> bool:
        closed = asyncio.Event()

        async def items() -> AsyncGenerator[dict[str, Any], None]:
            try:
                yield {"n": 1}
                await asyncio.Event().wait()
            finally:
                closed.set()

        stream = batches(items())

        async def job() -> None:
            await anext(stream)
            if close:
                await stream.aclose()

        await asyncio.create_task(job())
        await asyncio.wait_for(closed.wait(), 5)
        return closed.is_set()

    assert asyncio.run(scenario(close=True))
    assert asyncio.run(scenario(close=False))


def test_text_is_joined_up_to_the_limit_of_a_post() -> None:
    """Nothing is lost or reordered, and no string outgrows what the platform takes."""
    texts = [f"data: {n:06d} {'x' * 50_000}\n\n" for n in range(40)]
    merged = merge_text(texts)
    assert "".join(merged) == "".join(texts)
    assert 1 < len(merged) < len(texts)
    assert all(len(json.dumps(text)) <= MAX_POST_BYTES for text in merged)


def test_plain_tokens_are_joined_and_the_last_word_stays_apart() -> None:
    """`finished` and `usage` keep a chunk of their own, as clients stop reading at it."""
    last = {"token": "", "finished": True, "finish_reason": "stop", "usage": {}}
    assert merge_chunks([token("He"), token("llo"), last]) == [token("Hello"), last]


def test_openai_chunks_are_joined_only_where_they_are_pure_text() -> None:
    """Roles, finish reasons, logprobs and other choices keep the chunk they came in."""
    role, end = chat({"role": "assistant", "content": ""}), chat({}, finish_reason="stop")
    chunks = [role, chat({"content": "a"}), chat({"content": "b"}), end]
    assert merge_chunks(chunks) == [role, chat({"content": "ab"}), end]
    logprobs = [chat({"content": "a"}, logprobs={"content": []}) for _ in range(2)]
    assert merge_chunks(logprobs) == logprobs
    others = [chat({"content": "a"}, index=n) for n in range(2)]
    assert merge_chunks(others) == others
    texts = [{"choices": [{"index": 0, "text": text, "logprobs": None}]} for text in "xy"]
    assert merge_chunks(texts) == [{"choices": [{"index": 0, "text": "xy", "logprobs": None}]}]


def test_joined_chunks_stay_under_the_limit() -> None:
    """A long backlog of tokens is several posts, none over the platform's limit."""
    chunks = [token("é" * 30_000) for _ in range(20)]
    merged = merge_chunks(chunks)
    assert "".join(c["token"] for c in merged) == "é" * 600_000
    assert all(len(json.dumps(chunk)) <= MAX_POST_BYTES for chunk in merged)


def test_lone_surrogates_are_replaced() -> None:
    """Text that UTF-8 cannot carry would lose the job inside the SDK."""
    assert postable({"a": ["x\ud800y", "ok 😀"]}) == {"a": ["x\ufffdy", "ok 😀"]}
    assert postable("plain") == "plain"


@pytest.mark.parametrize("value", [math.nan, [math.inf], object(), {"a": b"bytes"}])
def test_what_json_cannot_say_is_an_error(value: Any) -> None:
    """The SDK posts a bare NaN, and nothing at all for unknown objects."""
    with pytest.raises(InternalError):
        postable(value)
