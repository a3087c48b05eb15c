"""Server-sent events as OpenAI's clients read them: one `data:` line and a blank line each.

Both doors use them: HTTP writes the bytes to the socket, RunPod's OpenAI gateway passes them on as
text.
"""

from collections.abc import Mapping
from typing import Any

import orjson

DONE = b"data: [DONE]\n\n"
"""The last event of a stream that ended well. A stream that failed ends without it."""

_LINE_ENDS = [(char.encode(), f"\\u{ord(char):04x}".encode()) for char in "\u0085\u2028\u2029"]
"""JSON lets these stand, but clients that use `str.splitlines` cut lines there."""

MEDIA_TYPE = "text/event-stream"


def event(chunk: Mapping[str, Any]) -> bytes:
    """One chunk (or error body) as one event; the JSON is one line in UTF-8, so the event is too.

    Raises `TypeError` for what JSON does not have, lone surrogates too, save that NaN and Infinity
    become null: whoever puts numbers into chunks sees to that (`answer.finite`).
    """
    line = orjson.dumps(chunk)
    if not line.isascii():
        for char, escaped in _LINE_ENDS:
            line = line.replace(char, escaped)
    return b"data: %b\n\n" % line
