"""Server-sent events as OpenAI's clients read them: one `data:` line and a blank line each.

Both doors use this text: HTTP writes it to the socket, RunPod's OpenAI gateway passes it on.
"""

import json
from typing import Any

DONE = "data: [DONE]\n\n"
"""The last event of a stream that ended well. A stream that failed ends without it."""

_LINE_ENDS = {ord(char): f"\\u{ord(char):04x}" for char in "\u0085\u2028\u2029"}
"""JSON lets these stand, but clients that use `str.splitlines` cut lines there."""

MEDIA_TYPE = "text/event-stream"


def event(chunk: dict[str, Any]) -> str:
    """One chunk (or error body) as one event; the JSON is one line, so the event is too.

    Raises `ValueError` for NaN and Infinity, which JSON does not have.
    """
    text = json.dumps(chunk, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return f"data: {text if text.isascii() else text.translate(_LINE_ENDS)}\n\n"
