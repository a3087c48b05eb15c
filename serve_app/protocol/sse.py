"""Server-sent events: one `data:` line and a blank line per event.

A response chunk with a `type`, as in the Messages and Responses APIs, also has an `event:` line
with the type. HTTP writes the bytes to the socket; RunPod's OpenAI gateway forwards them as text.
Format: https://html.spec.whatwg.org/multipage/server-sent-events.html.
"""

from collections.abc import Mapping
from typing import Any

import orjson

DONE = b"data: [DONE]\n\n"
"""The last event of a complete stream of chunks without a `type`. A failed stream ends without it,
and a stream of events with a `type` has its own last event."""

KEEP_ALIVE = b": waiting\n\n"
"""A comment, which clients ignore."""

_LINE_ENDS = [(char.encode(), f"\\u{ord(char):04x}".encode()) for char in "\u0085\u2028\u2029"]
"""Line ends that JSON may contain, and their escapes. Clients that use `str.splitlines` would cut
the line there."""

MEDIA_TYPE = "text/event-stream"


def event(chunk: Mapping[str, Any]) -> bytes:
    """Returns one response chunk, or an error body, as one event in UTF-8.

    Raises `TypeError` for values that JSON cannot represent, including lone surrogates. NaN and
    Infinity would become null, so callers make numbers finite first (`response.finite`).
    """
    line = orjson.dumps(chunk)
    if not line.isascii():
        for char, escaped in _LINE_ENDS:
            line = line.replace(char, escaped)
    kind = chunk.get("type")
    name = b"" if kind is None else b"event: %b\n" % str(kind).encode()
    return b"%bdata: %b\n\n" % (name, line)
