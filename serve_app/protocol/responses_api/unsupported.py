"""Fields of the Responses API that have no effect here, and those that would change the answer.

`docs/fields.md` has the same lists.
"""

from serve_app.protocol.unsupported import Unsupported

IGNORED = frozenset(
    {
        "access_programs",
        "max_tool_calls",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "reasoning",
        "request_id",
        "safety_identifier",
        "service_tier",
        "user",
    }
)
"""Fields that are accepted with any value and not used: they do not change the answer."""

_STATELESS = "nothing is stored here; send the whole conversation as `input`"

UNSUPPORTED: Unsupported = {
    "background": ((False,), "a response is answered while the client waits"),
    "context_management": (([],), "items are never cut"),
    "conversation": ((), _STATELESS),
    "image": ((), "content is text"),
    "moderation": ((), "there is no moderation"),
    "previous_response_id": ((), _STATELESS),
    "prompt": ((), "there are no stored prompts; send `instructions` and `input`"),
    "store": ((False,), _STATELESS),
    "truncation": (("disabled",), "items are never cut"),
}
"""Fields that are accepted with these values only, and the reason."""
