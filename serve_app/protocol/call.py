"""One request to one route, and the reply to it, in the form that every endpoint uses.

An endpoint (HTTP, RunPod jobs) builds a `Call` and gets a `Reply`. Where the endpoint is another
process than the model, `MixtralServer.call` sends the reply as a sequence of `ReplyItem`s.
"""

import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NotRequired, TypedDict, final

from serve_app.error_body import ErrorBody
from serve_app.protocol.key_account import KeyAccount

TRACEPARENT = "traceparent"
"""Header in which a client names its own span: https://www.w3.org/TR/trace-context/."""
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
    """Made by this package. Logged and returned to the client, never used as a key."""
    arrived: float = field(default_factory=time.monotonic, compare=False)
    """When the request arrived, before its body, on the clock of `time.monotonic`, in seconds."""
    account: KeyAccount | None = field(default=None, compare=False)
    """That of the request's API key; None if no key is needed, and for jobs."""
    traceparent: str | None = field(default=None, compare=False)
    """The client's header of that name; it has an effect where answers are traced."""
    session_id: str | None = field(default=None, compare=False)
    """A job's header `x-session-id`; over HTTP, HAProxy reads it."""

    @property
    def group(self) -> str:
        """With whom the request shares the engine: the holder of its key."""
        return "" if self.account is None else self.account.group


@final
class Progress(TypedDict):
    """How much of a list of prompts is done."""

    progress: int
    """Percent."""
    message: str
    """For example "4 of 10 done"."""


@final
class ChunkItem(TypedDict):
    """One response chunk of a stream, as a JSON object that is not encoded yet."""

    chunk: JsonObject


@final
class ProgressItem(TypedDict):
    """How far a list of prompts is, sent after each prompt that ends."""

    progress: Progress


@final
class BodyItem(TypedDict):
    """The whole body of a reply that is not streamed. The last item."""

    status: int
    """The HTTP status."""
    body: JsonObject | str


@final
class ErrorItem(TypedDict):
    """Why the call failed, at its beginning or after some chunks. The last item."""

    status: int
    """The HTTP status."""
    error: ErrorBody
    event: NotRequired[JsonObject]
    """The last event of a stream, where the API has one of its own."""


ReplyItem = ChunkItem | ProgressItem | BodyItem | ErrorItem
"""What crosses Ray. A stream is `ChunkItem`s, the last of which says why the answer ended; any
other reply is `ProgressItem`s and one `BodyItem`. An `ErrorItem` may take the place of any item,
and nothing follows it. Keys tell the items apart."""


@dataclass(frozen=True, slots=True)
class JsonReply:
    """One JSON object."""

    body: JsonObject
    status: int = 200
    is_large: bool = False
    """Whether encoding it at once would delay other requests."""


@dataclass(frozen=True, slots=True)
class TextReply:
    """One text, such as the metrics."""

    text: str
    media_type: str
    headers: Mapping[str, str] = field(default_factory=dict)
    """The HTTP response has these beside those of every response."""


@dataclass(frozen=True, slots=True)
class StreamReply:
    """A streamed answer, which starts with the first iteration of `chunks`.

    The receiver must close `chunks`, on every way out: closing cancels the request. Iterating
    raises what makes the answer fail.
    """

    chunks: AsyncGenerator[JsonObject, None]
    error_event: Callable[[ErrorBody], JsonObject] | None = None
    """Makes the last event of a stream that fails, where the API has one of its own."""


@dataclass(frozen=True, slots=True)
class BatchReply:
    """The results of a list of prompts: progress as prompts end, then the body.

    The receiver must close `items`, on every way out: closing cancels the request.
    """

    items: AsyncGenerator[ProgressItem | BodyItem, None]


Reply = JsonReply | TextReply | StreamReply | BatchReply
