"""Merging chunks that came together, without losing or reordering anything."""

import asyncio
import json
from typing import Any

import pytest

from serve_app.protocol.sse import DONE, event
from serve_app.worker.output import Output, merged_chunks, merged_events
from serve_app.worker.posts import MAX_CHUNK_BYTES
from serve_app.worker.result import encode
from tests.worker.recorded import RecordedPosts


def token(text: str) -> dict[str, Any]:
    return {"token": text, "finished": False}


def chat(delta: dict[str, Any], **choice: Any) -> dict[str, Any]:
    return {"id": "c", "choices": [{"index": 0, "delta": delta, "finish_reason": None, **choice}]}


def test_text_is_joined_up_to_the_limit_of_a_post() -> None:
    """No event is lost or reordered, and no text exceeds RunPod's limit."""
    chunks = [{"n": n, "text": "x" * 50_000} for n in range(40)]
    texts = [event(chunk).decode() for chunk in chunks]
    merged = merged_events(chunks, DONE)
    assert "".join(merged) == "".join(texts) + DONE.decode()
    assert 1 < len(merged) < len(texts)
    assert all(len(json.dumps(text)) <= MAX_CHUNK_BYTES for text in merged)


def test_plain_tokens_are_joined_and_the_last_chunk_stays_apart() -> None:
    """The last chunk stays on its own, because clients stop reading at it."""
    last = {"token": "", "finished": True, "finish_reason": "stop", "usage": {}}
    assert merged_chunks([token("He"), token("llo"), last]) == [token("Hello"), last]


def test_openai_chunks_are_joined_only_where_they_are_pure_text() -> None:
    """Roles, finish reasons, logprobs and other choices keep the chunk they came in."""
    role, end = chat({"role": "assistant", "content": ""}), chat({}, finish_reason="stop")
    chunks = [role, chat({"content": "a"}), chat({"content": "b"}), end]
    assert merged_chunks(chunks) == [role, chat({"content": "ab"}), end]
    logprobs = [chat({"content": "a"}, logprobs={"content": []}) for _ in range(2)]
    assert merged_chunks(logprobs) == logprobs
    others = [chat({"content": "a"}, index=n) for n in range(2)]
    assert merged_chunks(others) == others
    texts = [{"choices": [{"index": 0, "text": text, "logprobs": None}]} for text in "xy"]
    assert merged_chunks(texts) == [{"choices": [{"index": 0, "text": "xy", "logprobs": None}]}]


def test_events_of_messages_are_joined_where_they_are_text() -> None:
    """Neighbors of one content block become one event; other events stay as they are."""

    def text(text: str, index: int = 0) -> dict[str, Any]:
        delta = {"type": "text_delta", "text": text}
        return {"type": "content_block_delta", "index": index, "delta": delta}

    stop = {"type": "content_block_stop", "index": 0}
    assert merged_chunks([text("a"), text("b"), stop]) == [text("ab"), stop]
    assert merged_chunks([text("a"), text("b", 1)]) == [text("a"), text("b", 1)]


def test_events_of_messages_are_joined_where_they_are_arguments() -> None:
    """Arguments of one call are joined, and never with a text."""

    def event(**delta: Any) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": 0, "delta": delta}

    parts = [event(type="input_json_delta", partial_json=part) for part in ('{"a"', ": 1}")]
    assert merged_chunks(parts) == [event(type="input_json_delta", partial_json='{"a": 1}')]
    mixed = [event(type="text_delta", text="a"), parts[0]]
    assert merged_chunks(mixed) == mixed


def test_events_of_responses_are_joined_and_keep_their_order() -> None:
    """Deltas of one item become one, whose sequence number is the last one's."""

    def delta(number: int, text: str, item: str = "m") -> dict[str, Any]:
        kind = "response.output_text.delta"
        return {"type": kind, "sequence_number": number, "item_id": item, "delta": text}

    done = {"type": "response.output_text.done", "sequence_number": 4, "text": "ab"}
    assert merged_chunks([delta(2, "a"), delta(3, "b"), done]) == [delta(3, "ab"), done]
    assert merged_chunks([delta(2, "a"), delta(3, "b", "n")]) == [delta(2, "a"), delta(3, "b", "n")]


def test_events_with_log_probabilities_stay_apart() -> None:
    """Two tokens that are equal in everything keep their log probabilities."""
    event = {
        "type": "response.output_text.delta",
        "delta": "a",
        "logprobs": [{"token": "a", "logprob": -0.5}],
    }
    events = [{**event, "sequence_number": number} for number in (7, 8)]
    assert merged_chunks(events) == events


def test_joined_chunks_stay_under_the_limit() -> None:
    """A long backlog of tokens becomes several chunks, none over RunPod's limit."""
    chunks = [token("\0" * 30_000) for _ in range(20)]  # 6 bytes each, the most that JSON takes
    merged = merged_chunks(chunks)
    assert "".join(c["token"] for c in merged) == "\0" * 600_000
    assert len(merged) < len(chunks)
    assert all(len(json.dumps(chunk)) <= MAX_CHUNK_BYTES for chunk in merged)


def test_a_value_is_written_as_json_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chunk that is posted and the result hold the same bytes."""
    written: list[Any] = []

    def counted(value: Any) -> bytes:
        written.append(value)
        return encode(value)

    monkeypatch.setattr("serve_app.worker.output.encode", counted)
    posts = RecordedPosts()
    output = Output(posts, is_list=True)
    assert output.is_empty
    for value in (token("a"), "text"):
        asyncio.run(output.add(value))
    assert not output.is_empty
    assert written == [token("a"), "text"]
    assert output.result().body() == b'{"output":[%b]}' % b",".join(posts.encoded)
