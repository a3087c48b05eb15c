"""Lines of HAProxy's configuration that refuse requests while the engine's queue is full.

A refusal by the replica takes time of its event loop, which every answer needs, and a burst of
requests waits in the replica's sockets until the loop has read each of them. So HAProxy refuses
generating requests beyond the places of the queue itself, before it reads the body.

The replica sends the number of places (`PLACES`, a header of its `/ping` and of its refusals).
HAProxy allows as many concurrent requests for each replica. Connections and places are not the
same: a large body that is partly sent has a connection and no place (a small one waits in HAProxy).
Only the engine's queue decides whether it is full, so one request beyond the limit is sent to the
replica every `ASK_EVERY_US`. If the replica refuses it, the queue is full. Then the next such
request is sent after a time in which few places become free, at most a second.

`Retry-After` assigns times to refused requests one after another, as in `engine/retry_after.py`. No
replica has many more requests than the mean (`haproxy_sessions.py`). If several HAProxy processes
share replicas, each counts only its own requests, so the replicas refuse more. While the queue is
full, a request without an API key gets this refusal too.

HAProxy's threads may write a `proc` variable at the same time. The effect is harmless: two requests
get the same time, one refusal is not counted, or one more request is sent to the replica.
"""

from serve_app.engine.retry_after import MAX_S
from serve_app.node import haproxy_errors
from serve_app.protocol.header_names import PLACES, REFUSED

PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/prompt",
)
"""Routes whose requests need a place in the engine's queue."""
MAX_WAIT_US = MAX_S * 1_000_000
"""Maximum `Retry-After`, in microseconds."""
ASK_EVERY_US = 1_000
"""Microseconds between requests beyond the limit that are sent to the replica, while it accepts
them."""
BODY_S = 30
"""Maximum seconds until a body, or its first 15 kB, has arrived. Until then the request waits in
HAProxy and does not count for the limit."""


def rules(backend: str) -> list[str]:
    """Returns the lines for the section of the server's port. `backend` names the section of the
    replicas."""
    lines = [
        *_decision(backend),
        *_turn(),
        f"http-request return {haproxy_errors.refusal()} if is_refused",
        f"http-request wait-for-body time {BODY_S}s",
        f"http-request del-header {REFUSED}",
        f"http-request set-header {REFUSED} %[var(proc.num_refused,0)] if generates",
        "http-request set-var(proc.num_refused) int(0) if generates",
        *_limits(),
    ]
    return [f"    {line}" for line in lines]


def _decision(backend: str) -> list[str]:
    """Returns lines that set `is_refused` if all places are in use and it is too early to try the
    replica again.

    Example with 100 places, all in use, and `full_us` 150,000: the request at time 0 is sent to the
    replica, and `next_ask` becomes 1 ms. The replica refuses it at 0.4 ms, so `next_ask` becomes
    150.4 ms. Further requests are refused here. The first one after 150.4 ms is sent again. If the
    replica accepts it, `next_ask` is 1 ms after it.
    """
    return [
        "acl generates var(txn.generates) -m bool",
        "acl is_over var(txn.is_over) -m bool",
        "acl is_refused var(txn.is_refused) -m bool",
        f"http-request set-var(txn.generates) bool(true) if METH_POST {{ path {' '.join(PATHS)} }}",
        "http-request set-var(txn.now) date(0,us) if generates",
        f"http-request set-var(txn.num_open) be_conn({backend}) if generates",
        f"http-request set-var(txn.num_places) nbsrv({backend}),mul(proc.num_places) if generates",
        "http-request set-var(txn.is_over) bool(true) if generates"
        " { var(txn.num_places),sub(txn.num_open) le 0 }",
        "http-request set-var(txn.is_refused) bool(true) if is_over"
        " { var(proc.next_ask),sub(txn.now) gt 0 }",
        f"http-request set-var(proc.next_ask) var(txn.now),add({ASK_EVERY_US})"
        " if is_over !is_refused",
    ]


def _turn() -> list[str]:
    """Returns lines that set `wait_s` (`haproxy_errors.RETRY_AFTER`) of a refusal, and count it.

    Example with a free place every 500,000 us: three requests that are refused together get turns
    0.5, 1 and 1.5 s later, which are rounded up to `Retry-After` 1, 1 and 2.
    """
    return [
        # `proc.turn` is never in the past, and never further away than the longest wait.
        "http-request set-var(proc.turn) var(txn.now)"
        " if is_refused !{ var(proc.turn),sub(txn.now) gt 0 }",
        "http-request set-var(proc.turn) var(proc.turn),add(proc.place_us) if is_refused",
        f"http-request set-var(proc.turn) var(txn.now),add({MAX_WAIT_US})"
        f" if is_refused {{ var(proc.turn),sub(txn.now) gt {MAX_WAIT_US} }}",
        "http-request set-var(txn.wait_s) var(proc.turn),sub(txn.now),add(999999),div(1000000)"
        " if is_refused",
        # Other threads may have changed `proc.turn` meanwhile.
        f"http-request set-var(txn.wait_s) int({MAX_S})"
        f" if is_refused {{ var(txn.wait_s),sub({MAX_S}) gt 0 }}",
        "http-request set-var(txn.wait_s) var(proc.min_s)"
        " if is_refused { var(txn.wait_s),sub(proc.min_s) lt 0 }",
        "http-request set-var(proc.num_refused) var(proc.num_refused,0),add(1) if is_refused",
    ]


def _limits() -> list[str]:
    """Returns lines that store the numbers in a replica's `PLACES` header."""
    names = ("num_places", "place_us", "full_us", "min_s")
    rules = [
        f"http-response set-var(proc.{name}) res.hdr({PLACES},{number}),add(0) if has_limits"
        for number, name in enumerate(names, 1)
    ]
    return [
        f"acl has_limits res.hdr({PLACES}) -m found",
        *rules,
        "http-response set-var(proc.next_ask) date(0,us),add(proc.full_us)"
        " if has_limits { status 429 }",
        f"http-response del-header {PLACES}",
    ]
