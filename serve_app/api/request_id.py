"""The ids of a request in the headers of its response (`protocol/header_names.py`)."""

import logging
import re
import secrets

from starlette.requests import HTTPConnection
from starlette.types import Scope

from serve_app.error_body import is_messages
from serve_app.protocol.header_names import ANTHROPIC_ID, CLIENT_ID, MAX_ID_CHARS, OUR_ID

log = logging.getLogger(__name__)

_UUID4 = re.compile(rb"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


def ids_of(request: HTTPConnection) -> tuple[str, dict[str, str]]:
    """Returns our id of a request, and the response headers with our id and the client's.

    Ray Serve adds an `x-request-id` as the last header of a request without one, and sends the
    header back itself. Our id is then Serve's id, so that both response headers are equal. Two
    `x-request-id` headers would reach clients as one joined value, so only Serve sends it back.
    """
    name, last = request.scope["headers"][-1] if request.scope["headers"] else (b"", b"")
    is_serves = name == CLIENT_ID.encode() and _UUID4.fullmatch(last) is not None
    request_id = last.decode() if is_serves else secrets.token_hex(16)
    headers = {OUR_ID: request_id}
    if is_messages(request.scope["path"]):
        headers[ANTHROPIC_ID] = request_id
    if is_serves:
        return request_id, headers
    client_id = request.headers.get(CLIENT_ID)
    if client_id is None:
        return request_id, {CLIENT_ID: request_id, **headers}
    fields = {"request_id": request_id, "client_request_id": client_id[:MAX_ID_CHARS]}
    log.info(
        "request %s has the client's id %.128r", request_id, client_id, extra={"fields": fields}
    )
    return request_id, headers


def ids_before_serve(request: HTTPConnection) -> tuple[str, dict[str, str]]:
    """Returns the same as `ids_of`, with the client's id in any case: for a response that does not
    pass Ray Serve."""
    request_id, headers = ids_of(request)
    return request_id, {CLIENT_ID: request.headers.get(CLIENT_ID, request_id), **headers}


def path_of(scope: Scope) -> str:
    """Returns the request's path without the prefix at which this app is mounted."""
    path: str = scope["path"]
    prefix: str = scope.get("root_path", "").rstrip("/")
    return path.removeprefix(prefix) if path.startswith(f"{prefix}/") else path
