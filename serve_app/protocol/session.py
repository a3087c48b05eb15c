"""The text of a request that is constant in a conversation; its hash chooses a replica.

Each replica keeps the KV blocks of the prompts that it has computed. The next prompt of a
conversation begins with the previous one, so the same replica has to compute only the new part.

A new conversation goes to the replica that its hash chooses, or to the next replica if that one has
more than its share of requests. Later requests go to the same replica, unless it has many more
requests than the others. The hash alone would not balance the loads: with 32 conversations and four
replicas, one replica gets 5 conversations and another one 11. About 300 conversations are needed
until the loads are equal within 20 percent.

The text is the first of these in a request:

    the header `x-session-id`
    the body's `prompt_cache_key`, OpenAI's name for it
    the first message that is not a system message
    the first text of a `prompt` or `input`

`node/haproxy_sessions.py` implements this rule for HAProxy, `node/session_router.py` for the
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
NEW_LOAD = 110
"""Load limit for new conversations, in percent of the mean number of requests; the limit is rounded
up and at least one. A new conversation goes to the first replica below the limit in the order of
hashes (arXiv 1608.01350)."""
KEEP_LOAD, KEEP_MORE = 110, 1
"""A conversation leaves its replica if the replica has more requests than `KEEP_LOAD` percent of
the mean plus `KEEP_MORE`. The conversation then counts as new."""
NUM_KEPT = 100_000
"""Maximum number of conversations whose replica is remembered."""
SYSTEM_ROLES = ("system", "developer")


class Place(NamedTuple):
    """A possible place of the text in a body."""

    path: str
    """A JSON path."""
    after_system: bool | None = None
    """Whether the first message must be a system message (True), must not be one (False), or either
    (None)."""

    @property
    def keys(self) -> list[str | int]:
        """The path as keys of objects and indices of arrays."""
        return [int(key) if key.isdigit() else key for key in re.findall(r"\w+", self.path)]


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
"""The possible places of the text in a body. The first place with a string is used."""
_ROLE = Place("$.messages[0].role").keys
_KEYS = [(place.keys, place.after_system) for place in PLACES]


def session_of(call: "Call") -> str | None:
    """Returns the hash of the call's text, 16 characters; None if the call has no such text.

    Ray gets only the hash, because its metadata and logs must not contain a user's text.
    """
    text = _in_body(call.body) if call.session_id is None else call.session_id
    if text is None:
        return None
    start = text[:NUM_CHARS].encode("utf-8", "surrogatepass")
    return hashlib.blake2b(start, digest_size=8).hexdigest()


def _in_body(body: Any) -> str | None:
    has_system = _at(body, _ROLE) in SYSTEM_ROLES
    for keys, after_system in _KEYS:
        if after_system in (None, has_system) and isinstance(text := _at(body, keys), str):
            return text
    return None


def _at(value: Any, keys: list[str | int]) -> Any:
    """Returns the part of `value` below `keys`; None if there is none."""
    for key in keys:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return None
    return value
