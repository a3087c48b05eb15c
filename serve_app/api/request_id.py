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
    """Returns our id of a request, and the headers of its response with our id and the client's.

    Ray Serve gives a request that has no `x-request-id` one, as the last header, and sends it back
    itself. That id becomes ours, so that both headers are equal. A second header of that name would
    reach clients as one joined value, so a client's own id is left to Serve to send back, too.
    """
    name, last = request.scope["headers"][-1] if request.scope["headers"] else (b"", b"")
    is_serves = name == CLIENT_ID.encode() and _UUID4.fullmatch(last) is not None
    request_id = last.decode() if is_serves else secrets.token_hex(16)
    headers = {OUR_ID: request_id}
    if is_messages(request.scope["path"]):
        headers[ANTHROPIC_ID] = request_id
    if is_serves:
        return request_id, headers
    given = request.headers.get(CLIENT_ID)
    if given is None:
        return request_id, {CLIENT_ID: request_id, **headers}
    fields = {"request_id": request_id, "client_request_id": given[:MAX_ID_CHARS]}
    log.info("request %s has the client's id %.128r", request_id, given, extra={"fields": fields})
    return request_id, headers


def ids_before_serve(request: HTTPConnection) -> tuple[str, dict[str, str]]:
    """Returns the same for a response that does not pass Ray Serve, which would add the client's
    id."""
    request_id, headers = ids_of(request)
    return request_id, {CLIENT_ID: request.headers.get(CLIENT_ID, request_id), **headers}


def path_of(scope: Scope) -> str:
    """Returns the path below the prefix that this app is mounted at."""
    path: str = scope["path"]
    prefix: str = scope.get("root_path", "").rstrip("/")
    return path.removeprefix(prefix) if path.startswith(f"{prefix}/") else path
