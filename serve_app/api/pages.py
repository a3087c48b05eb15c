"""The handlers of the pages for people, `/` and `/docs`, and of `/openapi.json`.

Each page is one file in `static/` that contains its script and its style. Its header
Content-Security-Policy (https://www.w3.org/TR/CSP3/) allows the browser to run only these and to
connect only to this server.
"""

import asyncio
import base64
import hashlib
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from serve_app.api import openapi
from serve_app.api.route import Route
from serve_app.protocol.call import Call, JsonObject, JsonReply, Reply, TextReply

if TYPE_CHECKING:
    from serve_app.api.served_model import ServedModel

STATIC = Path(__file__).parent / "static"


async def page(served: "ServedModel", call: Call) -> Reply:
    """Returns the page on which users try the model."""
    return await asyncio.to_thread(_page, "index.html")


async def docs(served: "ServedModel", call: Call) -> Reply:
    """Returns a page that shows `/openapi.json`."""
    return await asyncio.to_thread(_page, "docs.html")


async def describe(served: "ServedModel", routes: tuple[Route, ...]) -> Reply:
    """Returns the description of `routes`."""
    return JsonReply(await asyncio.to_thread(_document, routes, served.keys.are_needed))


@cache
def _page(name: str) -> TextReply:
    text = (STATIC / name).read_text(encoding="utf-8")
    headers = {
        "content-security-policy": _policy(text),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return TextReply(text, "text/html; charset=utf-8", headers)


def _policy(text: str) -> str:
    """Returns the policy that allows the scripts and styles in `text`, and requests to this
    server."""
    hashes = {
        tag: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
            for content in re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        )
        for tag in ("script", "style")
    }
    return (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


@cache
def _document(routes: tuple[Route, ...], has_keys: bool) -> JsonObject:
    return openapi.document(routes, has_keys=has_keys)
