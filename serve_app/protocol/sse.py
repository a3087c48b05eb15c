"""Server-sent events as clients read them: one `data:` line and a blank line each.

A response chunk with a `type`, as the Messages and Responses APIs have them, is an event of that
name: an `event:` line comes first.

HTTP writes the bytes to the socket; RunPod's OpenAI gateway passes them on as text.
Format: https://html.spec.whatwg.org/multipage/server-sent-events.html.
"""

from collections.abc import Mapping
from typing import Any

import orjson

DONE = b"data: [DONE]\n\n"
"""The last event of a complete stream of chunks without a `type`. A stream that fails ends without
it, and so does one of typed events, the last of which says that it is complete."""

KEEP_ALIVE = b": waiting\n\n"
"""A comment, which clients read over."""

_LINE_ENDS = [(char.encode(), f"\\u{ord(char):04x}".encode()) for char in "\u0085\u2028\u2029"]
"""JSON may contain these, but clients that use `str.splitlines` cut lines there."""

MEDIA_TYPE = "text/event-stream"


def event(chunk: Mapping[str, Any]) -> bytes:
    """Returns one response chunk, or an error body, as one event in UTF-8.

    Raises `TypeError` for values that JSON does not have, lone surrogates included. NaN and
    Infinity would become null, so callers make numbers finite first (`response.finite`).
    """
    line = orjson.dumps(chunk)
    if not line.isascii():
        for char, escaped in _LINE_ENDS:
            line = line.replace(char, escaped)
    kind = chunk.get("type")
    name = b"" if kind is None else b"event: %b\n" % str(kind).encode()
    return b"%bdata: %b\n\n" % (name, line)
