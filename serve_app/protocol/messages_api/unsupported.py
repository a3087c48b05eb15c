"""Fields of the Messages API that have no effect here, and those that would change the answer.

docs/fields.md has the same lists. The headers `anthropic-version` and `anthropic-beta` are not
read.
"""

from serve_app.protocol.unsupported import Unsupported

IGNORED = frozenset(
    {
        "billing_policy",
        "cache_control",
        "diagnostics",
        "fallback_credit_token",
        "fallbacks",
        "inference_geo",
        "metadata",
        "service_tier",
        "speed",
        "user_profile_id",
        "workspace_id",
    }
)
"""Fields that are accepted with any value and not used: they do not change the answer."""

UNSUPPORTED: Unsupported = {
    "compaction": ((), "messages are never summarized"),
    "container": ((), "there are no containers"),
    "mcp_servers": (([],), "the server calls no other servers"),
    "thread": ((), "nothing is stored here; send the whole conversation as `messages`"),
}
"""Fields that are accepted with these values only, and the reason."""
