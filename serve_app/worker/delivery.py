"""From a stream of items to what is posted: at once when idle, merged while a post is under way.

The SDK posts every yield and waits for the answer, so a yield per token would cap a job at one
token per round trip. Here a task of its own drains the model's answer into a buffer; whoever
posts takes all that has come meanwhile. The model never waits for a post, and no timer delays one.

Knows the shapes of chunks only as far as merging needs it, and nothing of RunPod.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from serve_app.errors import InternalError

Item = dict[str, Any]

MAX_POST_BYTES = 900_000
"""The platform takes 1 MB a chunk; the rest is left for the envelope and escapes."""


async def batches(items: AsyncGenerator[Item, None]) -> AsyncGenerator[list[Item], None]:
    """The items in order: the first as soon as it is there, then all that came since.

    Closes `items` on every way out, which is what cancels a request: also when the task that
    iterates ends without closing this generator, as the SDK's does when a job is stopped in the
    middle of a post.
    """
    waiting: list[Item] = []
    news = asyncio.Event()

    async def drain() -> None:
        async with contextlib.aclosing(items):
            async for item in items:
                waiting.append(item)
                news.set()

    producer = asyncio.create_task(drain())
    producer.add_done_callback(lambda _: news.set())
    if owner := asyncio.current_task():
        owner.add_done_callback(lambda _: producer.cancel())
    try:
        while True:
            await news.wait()
            news.clear()
            is_last = producer.done()
            if waiting:
                batch = waiting.copy()
                waiting.clear()
                yield batch
            if is_last:
                break
        producer.result()  # raises what ended the stream
    finally:
        producer.cancel()
        await asyncio.wait({producer})


def merge_text(texts: Sequence[str]) -> list[str]:
    """SSE events joined into as few strings as the platform's limit allows."""
    merged: list[str] = []
    size = 0
    for text in texts:
        num_bytes = _num_bytes(text)
        if merged and size + num_bytes <= MAX_POST_BYTES:
            merged[-1] += text
            size += num_bytes
        else:
            merged.append(text)
            size = num_bytes
    return merged


def merge_chunks(chunks: Sequence[Item]) -> list[Item]:
    """Neighbours that differ in their text alone become one; anything else stays as it is."""
    merged: list[Item] = []
    size = 0
    for chunk in chunks:
        num_bytes = _num_bytes(chunk)
        joined = _joined(merged[-1], chunk) if merged else None
        if joined is not None and size + num_bytes <= MAX_POST_BYTES:
            merged[-1] = joined
            size += num_bytes
        else:
            merged.append(chunk)
            size = num_bytes
    return merged


def _joined(first: Item, second: Item) -> Item | None:
    """Both as one chunk, or None where one of them says more than text."""
    match first, second:
        case ({"token": str(a), "finished": False}, {"token": str(b), "finished": False}):
            return {"token": a + b, "finished": False} if len(first) == len(second) == 2 else None
        case ({"choices": [one]}, {"choices": [two]}):
            head, tail = _text_of(one), _text_of(two)
            same = {**first, "choices": []} == {**second, "choices": []}
            if head is None or tail is None or not same or one.get("index") != two.get("index"):
                return None
            text = head + tail
            said = {"text": text} if "text" in one else {"delta": {"content": text}}
            return {**first, "choices": [{**one, **said}]}
    return None


def _text_of(choice: Item) -> str | None:
    """The text of a choice that carries nothing else."""
    rest = {k: v for k, v in choice.items() if k not in ("index", "delta", "text")}
    if any(value is not None for value in rest.values()):
        return None
    match choice:
        case {"delta": {"content": str(text), **more}} if not more and "text" not in choice:
            return text
        case {"text": str(text)} if "delta" not in choice:
            return text
    return None


def postable(value: Any) -> Any:
    """`value` as the SDK can post it: real JSON, and text that UTF-8 can carry.

    The SDK loses a job without a word over a lone surrogate or an object that JSON does not know,
    and posts a bare NaN. Raises `InternalError` for what cannot be said in JSON.
    """
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InternalError("The answer cannot be said in JSON.") from error
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.loads(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    return value


def _num_bytes(value: Any) -> int:
    return len(json.dumps(value))
