"""The text of a request that stays the same in a conversation; its hash chooses a replica.

Each replica keeps the KV blocks of the prompts that it has seen. The next turn of a conversation
begins with the last one's prompt, so the replica that had the last turn computes the new part only.
The text is the first of these that a request has:

    the header `x-session-id`
    the body's `prompt_cache_key`, OpenAI's name for it
    the first message that is not of the system
    the first text of a `prompt` or `input`

`node/haproxy_sessions.py` writes this rule for HAProxy, `node/session_router.py` follows it for the
deployment handle.
"""

import hashlib
import re
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # HAProxy's program imports this module, and should start fast
    from serve_app.protocol.call import Call

SESSION_ID = "x-session-id"
"""Header in which a client names its conversation."""
NUM_CHARS = 256
"""Length of the part of the text that is hashed: bytes in HAProxy, characters in Python."""
MAX_LOAD = 150
"""Most requests at one replica, in percent of the mean; rounded up, and at least one. A replica
that has them takes no more, and the next one of the hash does (arXiv 1608.01350), so that loads
stay equal when all prompts begin alike."""
SYSTEM_ROLES = ("system", "developer")


class Place(NamedTuple):
    """Where a body may have the text."""

    path: str
    """A JSON path."""
    after_system: bool | None = None
    """Whether the first message must be of the system, or must not be; None: either."""


PLACES = (
    Place("$.prompt_cache_key"),
    Place("$.messages[1].content", after_system=True),
    Place("$.messages[1].content[0].text", after_system=True),
    Place("$.messages[0].content", after_system=False),
    Place("$.messages[0].content[0].text", after_system=False),
    Place("$.prompt"),
    Place("$.input"),
    Place("$.input[0].content"),
    Place("$.input[0].content[0].text"),
)
"""Where a body may have the text; the first that has a string counts."""


def session_of(call: "Call") -> str | None:
    """Returns the hash of the call's text, 16 characters; None if it has no such text.

    Ray gets the hash alone, because its metadata and logs must not have a user's text.
    """
    text = _in_body(call.body) if call.session_id is None else call.session_id
    if text is None:
        return None
    start = text[:NUM_CHARS].encode("utf-8", "surrogatepass")
    return hashlib.blake2b(start, digest_size=8).hexdigest()


def _in_body(body: Any) -> str | None:
    has_system = _at(body, "$.messages[0].role") in SYSTEM_ROLES
    for path, after_system in PLACES:
        if after_system in (None, has_system) and isinstance(text := _at(body, path), str):
            return text
    return None


def _at(value: Any, path: str) -> Any:
    """Returns what `value` has at a JSON path; None if there is nothing."""
    for key in re.findall(r"\w+", path):
        try:
            value = value[int(key) if key.isdigit() else key]
        except (KeyError, IndexError, TypeError):
            return None
    return value
