"""Server-sent events as OpenAI's clients read them: one `data:` line and a blank line each.

Both doors use this text: HTTP writes it to the socket, RunPod's OpenAI gateway passes it on.
"""

import json
from typing import Any

DONE = "data: [DONE]\n\n"
"""The last event of a stream that ended well. A stream that failed ends without it."""

MEDIA_TYPE = "text/event-stream"


def event(chunk: dict[str, Any]) -> str:
    """One chunk (or error body) as one event; the JSON is one line, so the event is too."""
    return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"
