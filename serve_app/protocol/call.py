"""Call and Reply: one request to one route and its reply, in a form that all endpoints use.

An endpoint (HTTP, RunPod jobs) creates a `Call` and gets a `Reply`. If the endpoint is in another
process than the model, `MixtralServer.call` sends the reply as a sequence of `ReplyItem`s.
"""

import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict, final

from serve_app.error_body import ErrorBody
from serve_app.protocol.key_account import KeyAccount

TRACEPARENT = "traceparent"
"""The header with a client's own span: https://www.w3.org/TR/trace-context/."""
JsonObject = dict[str, Any]
"""A JSON object as Python values."""


@dataclass(frozen=True, slots=True)
class Call:
    """One request to one route."""

    method: str
    path: str
    body: Any
    """The parsed JSON value; None if the request has no body."""
    request_id: str
    """Our id of the request. It is logged and returned to the client, but never used as a key."""
    arrived: float = field(default_factory=time.monotonic, compare=False)
    """Arrival time of the request, before its body, on the clock of `time.monotonic`, in
    seconds."""
    account: KeyAccount | None = field(default=None, compare=False)
    """The account of the request's API key; None if no key is needed, and for jobs."""
    traceparent: str | None = field(default=None, compare=False)
    """The client's `traceparent` header; used if answers are traced."""
    session_id: str | None = field(default=None, compare=False)
    """A job's header `x-session-id`; over HTTP, HAProxy reads it."""

    @property
    def group(self) -> str:
        """The group in which the request shares the engine: the name of its API key."""
        return "" if self.account is None else self.account.group


@final
class Progress(TypedDict):
    """The progress of a list of prompts."""

    progress: int
    """Progress in percent."""
    message: str
    """For example "4 of 10 done"."""


@final
class ChunkItem(TypedDict):
    """One response chunk of a stream, as a JSON object that is not encoded yet."""

    chunk: JsonObject


@final
class ProgressItem(TypedDict):
    """The progress of a list of prompts, sent after each finished prompt."""

    progress: Progress


@final
class BodyItem(TypedDict):
    """The complete body of a reply that is not streamed. It is the last item."""

    status: int
    """The HTTP status."""
    body: JsonObject | str


@final
class ErrorItem(TypedDict):
    """The error of a failed call, at its beginning or after some chunks. It is the last item."""

    status: int
    """The HTTP status."""
    error: ErrorBody


ReplyItem = ChunkItem | ProgressItem | BodyItem | ErrorItem
"""The items that are sent through Ray. A stream consists of `ChunkItem`s; the last one has the
finish reason. Any other reply consists of `ProgressItem`s and one `BodyItem`. An `ErrorItem` may
replace any item and is always the last one. The keys distinguish the types."""


@dataclass(frozen=True, slots=True)
class JsonReply:
    """One JSON object."""

    body: JsonObject
    status: int = 200
    is_large: bool = False
    """Whether the body is so large that encoding it at once would delay other requests."""


@dataclass(frozen=True, slots=True)
class TextReply:
    """One text, such as the metrics."""

    text: str
    media_type: str
    headers: Mapping[str, str] = field(default_factory=dict)
    """Additional headers of the HTTP response."""


@dataclass(frozen=True, slots=True)
class StreamReply:
    """A streamed answer, which starts with the first iteration of `chunks`.

    The receiver must close `chunks` in every case, because closing cancels the request. Iterating
    raises the error that makes the answer fail.
    """

    chunks: AsyncGenerator[JsonObject, None]


@dataclass(frozen=True, slots=True)
class BatchReply:
    """The results of a list of prompts: progress while prompts finish, then the body.

    The receiver must close `items` in every case, because closing cancels the request.
    """

    items: AsyncGenerator[ProgressItem | BodyItem, None]


Reply = JsonReply | TextReply | StreamReply | BatchReply
