"""The one shape in which both doors hand a request to the server, and hear its answer.

Knows no HTTP library and no job: a method, a path, a JSON value; a status and JSON values back.
"""

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Call:
    """One request to one route of door 1, whichever door it came through."""

    method: str
    path: str
    body: Any
    """The parsed JSON value; None where there was no body."""
    request_id: str
    """Made by us. Logged and echoed, never used as a key."""


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to a `Call`: one JSON object, a text, a body to come, or chunks as they come."""

    body: dict[str, Any] | None = None
    text: str | None = None
    """Of `media_type`, instead of a body."""
    steps: AsyncGenerator[dict[str, Any], None] | None = None
    """`{"progress": {"progress", "message"}}` again and again, then `{"body"}`: an answer that is
    long in coming. Whoever takes a reply with steps closes them, which cancels the request."""
    chunks: AsyncGenerator[dict[str, Any], None] | None = None
    """Chunk dicts, without `[DONE]`. Whoever takes a reply with chunks closes them: closing
    is what cancels the request. A failure raises out of the iteration as a `ServeError`."""
    status: int = 200
    media_type: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)
