"""A job's output: chunks that are ready together are merged, and each value is written as JSON
once.

The SDK posts every chunk separately, which limits a stream to one token per round trip. Here a post
contains all chunks since the previous post. The bytes of a value are posted as a chunk and kept for
the job's result.
"""

from collections.abc import Sequence
from typing import Any

from serve_app.protocol.sse import event
from serve_app.worker.posts import MAX_CHUNK_BYTES, Posts
from serve_app.worker.result import Result, encode

Chunk = dict[str, Any]

MAX_MERGED_CHARS = MAX_CHUNK_BYTES // 7
"""Maximum characters of a merged chunk. JSON needs at most 6 bytes per character; the remaining
seventh of the bytes is for the other fields."""


class Output:
    """The values of one job's output so far.

    The output is the list of its values, each posted as a chunk. If `is_list` is False, the output
    is the only value, which is posted with the result.
    """

    def __init__(self, posts: Posts, *, is_list: bool) -> None:
        self._posts = posts
        self._is_list = is_list
        self._values: list[bytes] = []

    @property
    def is_empty(self) -> bool:
        """Whether there is no value yet, so that the job can be run again."""
        return not self._values

    async def add(self, value: Any) -> None:
        """Adds `value`, and posts it as a chunk. Raises `InternalError` if it cannot be written as
        JSON."""
        encoded = encode(value)
        self._values.append(encoded)
        if self._is_list:
            await self._posts.chunk(encoded)

    def result(self) -> Result:
        """Returns the result of a job that succeeds."""
        if self._is_list:
            return Result(b"[%b]" % b",".join(self._values), is_list=True)
        (value,) = self._values
        return Result(value)


def merged_events(chunks: Sequence[Chunk], end: bytes = b"") -> list[str]:
    """Returns `chunks` as server-sent events, then `end`, in as few texts as RunPod's limit
    allows."""
    texts = [event(chunk).decode() for chunk in chunks]
    if end:
        texts.append(end.decode())
    merged: list[str] = []
    for text in texts:
        if merged and len(merged[-1]) + len(text) <= MAX_MERGED_CHARS:
            merged[-1] += text
        else:
            merged.append(text)
    return merged


def merged_chunks(chunks: Sequence[Chunk]) -> list[Chunk]:
    """Merges adjacent chunks that differ only in their text, within RunPod's limit.

    A merged event of a response has the last sequence number, so that the numbers still ascend.
    """
    merged: list[Chunk] = []
    for chunk in chunks:
        text = _joined_text(merged[-1], chunk) if merged else None
        if text is not None and len(text) <= MAX_MERGED_CHARS:
            merged[-1] = _with_text(chunk, text)
        else:
            merged.append(chunk)
    return merged


def _joined_text(first: Chunk, second: Chunk) -> str | None:
    """Returns the text of both, or None if they differ in anything else."""
    first_text, second_text = _text_of(first), _text_of(second)
    if first_text is None or second_text is None or _without_text(first) != _without_text(second):
        return None
    return first_text + second_text


def _without_text(chunk: Chunk) -> Chunk:
    """Returns the chunk without its text; chunks with equal results can be merged."""
    return {**_with_text(chunk, ""), "sequence_number": None}


def _text_of(chunk: Chunk) -> str | None:
    """Returns the text of a chunk with no other content; None for any other chunk."""
    match chunk:
        case {"token": str(text), "finished": False} if len(chunk) == 2:
            return text
        case {"choices": [{"delta": {"content": str(text), **more}} as choice]} if not more:
            field = "delta"
        case {"choices": [{"text": str(text)} as choice]}:
            field = "text"
        case {"type": "content_block_delta", "delta": {"text": str(text)}}:
            return text
        case {"type": "content_block_delta", "delta": {"partial_json": str(text)}}:
            return text
        case {"type": str(), "delta": str(text)} if not chunk.get("logprobs"):
            return text
        case _:
            return None
    has_more = any(v is not None for k, v in choice.items() if k not in ("index", field))
    return None if has_more else text


def _with_text(chunk: Chunk, text: str) -> Chunk:
    """Returns the chunk with `text` instead of its own."""
    if "token" in chunk:
        return {**chunk, "token": text}
    if "delta" in chunk:
        delta = chunk["delta"]
        if isinstance(delta, str):
            return {**chunk, "delta": text}
        (field,) = delta.keys() - {"type"}
        return {**chunk, "delta": {**delta, field: text}}
    (choice,) = chunk["choices"]
    changed = {"text": text} if "text" in choice else {"delta": {"content": text}}
    return {**chunk, "choices": [{**choice, **changed}]}
