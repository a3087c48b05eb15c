"""The check of a request's `Origin`, which browsers add to each POST of a page.

A server without API keys trusts all who reach it, and every page in a browser on the same network
reaches it. Two kinds of pages are refused:

    a page of another origin    Browsers let it send a body as text or as a form without asking.
                                They ask before any other content type, and the answer
                                (`cors.py`) permits nothing to origins that are not allowed.
    DNS rebinding               A page loads from a public name, which then changes its address to
                                this server's. The browser takes server and page for one origin.
                                Without TLS, only `Host` reveals it.

Clients other than browsers send no `Origin`. Browser extensions and desktop apps have origins of
schemes of their own, which no page can have; they pass.
"""

import re
from collections.abc import Mapping, Sequence

from serve_app.errors import OriginNotAllowed
from serve_app.protocol.field_errors import printable

PAGE_SCHEMES = ("http://", "https://")
OPAQUE = "null"
"""The origin of a sandboxed page, and of a page in a file."""
LOCAL_DOMAINS = ("localhost", "local", "internal", "lan", "home.arpa")
"""Domains in which nobody can register a name: RFC 6761, 6762 and 8375, and ICANN's reservation."""


def require_allowed(
    headers: Mapping[str, str], allowed_origins: Sequence[str], has_keys: bool
) -> None:
    """Raises `OriginNotAllowed` if a page that may not call the API has sent the request.

    The case of names in `headers` does not matter. `allowed_origins` is the setting
    `ApiSettings.allowed_origins`. A rebinding page has no key, so `Host` does not matter with keys.
    """
    origin = headers.get("origin")
    if origin is None or not (origin == OPAQUE or origin.startswith(PAGE_SCHEMES)):
        return
    if {"*", origin} & set(allowed_origins):
        return
    host = headers.get("host", "").lower()
    is_own = origin.partition("://")[2] == host
    may_be_rebound = not (has_keys or origin.startswith("https://")) and _is_public(host)
    if may_be_rebound or not (is_own or _is_json(headers.get("content-type", ""))):
        raise OriginNotAllowed(
            f"Pages of the origin {printable(origin)} may not send requests to this server; add it "
            "to `api.cors_origins` to allow them."
        )


def _is_json(content_type: str) -> bool:
    return content_type.partition(";")[0].strip().lower() == "application/json"


def _is_public(host: str) -> bool:
    """Returns whether `host`, with or without a port, is a name that anyone could register."""
    name = re.sub(r":\d*$", "", host).rstrip(".")
    last = name.rpartition(".")[2]
    is_address = last.isdecimal() or name.startswith("[")
    is_local = "." not in name or any(name.endswith(f".{domain}") for domain in LOCAL_DOMAINS)
    return not (is_address or is_local)
