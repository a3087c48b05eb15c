"""Lines of HAProxy's configuration for the errors that it sends by itself.

A client gets the status, the body and the headers that the server sends for the same `ServeError`.
HAProxy sets variables for each request and inserts them into the answer: the request's ids, and
the parts that differ below `/v1/messages`, whose errors have Anthropic's shape.
"""

import json

from serve_app.error_body import MESSAGES_PATH, error_body
from serve_app.errors import (
    FULL_QUEUE,
    LATE_BODY,
    NOT_READY,
    NOT_READY_RETRY_S,
    EngineDead,
    InvalidRequest,
    Loading,
    QueueFull,
    RequestTooSlow,
    ServeError,
)
from serve_app.node.cors import quoted
from serve_app.protocol.header_names import ANTHROPIC_ID, CLIENT_ID, MAX_ID_CHARS, OUR_ID

MAX_URL_CHARS = 8192

# Expressions that HAProxy replaces by the values of a request.
REQUEST_ID = "%[var(txn.request_id)]"
CLIENT_REQUEST_ID = "%[var(txn.client_id)]"
RETRY_AFTER = "%[var(txn.wait_s)]"

TOO_LONG = InvalidRequest(
    f"The URL is longer than the {MAX_URL_CHARS} characters that are allowed."
)
LOADING = Loading(NOT_READY, retry_after_s=NOT_READY_RETRY_S)
FULL = QueueFull(FULL_QUEUE)
NO_REPLICA = EngineDead("No replica of the model answers; send the request again.", retry_after_s=1)
TOO_SLOW = RequestTooSlow(LATE_BODY)
ERRORS = (TOO_LONG, LOADING, FULL, NO_REPLICA, TOO_SLOW)

IS_SERVES = f"!{{ res.hdr({OUR_ID}) -m found }}"
"""Condition: the answer comes from Serve, not from a replica of this server."""


def answer(error: ServeError, status: int | None = None, more: str = "") -> str:
    """Returns the arguments of HAProxy's answer for `error`, with `status` in place of its own."""
    body = error_body(error, REQUEST_ID)
    fields = {**body["error"], "type": _type(error)}
    text = quoted("{%[var(txn.shape)]" + json.dumps({"error": fields})[1:])
    headers = "".join(f" hdr {name} {value}" for name, value in error.headers.items())
    return (
        f"status {status or error.http_status} content-type application/json lf-string {text}"
        f"{headers}{more}"
    )


def defaults() -> list[str]:
    """Returns the lines for the section `defaults`."""
    answers = [*(answer(NO_REPLICA, status) for status in (502, 503, 504)), answer(TOO_SLOW)]
    return [f"    http-error {arguments}" for arguments in answers]


def request_variables() -> list[str]:
    """Returns the lines that set the variables for the answers to a request."""
    head = f'"type": "error", "request_id": "{REQUEST_ID}", '
    for_messages = [
        f"set-var-fmt(txn.shape) {quoted(head)}",
        *(
            f"set-var(txn.{error.code}) str({anthropics})"
            for error in ERRORS
            if (anthropics := _anthropic_type(error)) != error.type
        ),
    ]
    lines = [
        "set-var(txn.request_id) uuid",
        "set-var(txn.client_id) var(txn.request_id)",
        f"set-var(txn.client_id) req.fhdr({CLIENT_ID}),bytes(0,{MAX_ID_CHARS})"
        f" if {{ req.fhdr({CLIENT_ID}) -m found }}",
        *(f"{line} if {{ path_reg {MESSAGES_PATH} }}" for line in for_messages),
    ]
    return [f"    http-request {line}" for line in lines]


def rules() -> list[str]:
    """Returns the lines that refuse too long URLs, replace Serve's answers if no replica answers,
    and add the request's ids to HAProxy's answers."""
    ids = (
        (OUR_ID, REQUEST_ID, ""),
        (CLIENT_ID, CLIENT_REQUEST_ID, ""),
        (ANTHROPIC_ID, REQUEST_ID, " { var(txn.shape) -m found }"),
    )
    too_long = answer(TOO_LONG, 414, f" if {{ url,length gt {MAX_URL_CHARS} }}")
    return [
        f"    http-request return {too_long}",
        # The replica has died, before or after the request reached it.
        "    http-after-response set-status 503 if { status 502 504 }",
        # A 500 without our request id comes from Serve.
        f"    http-response return {answer(NO_REPLICA)} if {{ status 500 }} {IS_SERVES}",
        *(
            f"    http-after-response set-header {name} {value}"
            f" if {{ status 200 408 414 429 503 }} !{{ res.hdr({name}) -m found }}{condition}"
            for name, value, condition in ids
        ),
    ]


def refusal() -> str:
    """Returns the arguments of the answer to a request while the queue is full."""
    return answer(FULL, more=f" hdr Retry-After {RETRY_AFTER}")


def loading() -> str:
    """Returns the rule for requests before Serve has a replica and a route."""
    return f"    http-request return {answer(LOADING)}"


def _type(error: ServeError) -> str:
    """Returns the error's `type`, or an expression if Anthropic's `type` differs."""
    if _anthropic_type(error) == error.type:
        return error.type
    return f"%[var(txn.{error.code},{error.type})]"


def _anthropic_type(error: ServeError) -> str:
    return error_body(error, REQUEST_ID, "/v1/messages")["error"]["type"]
