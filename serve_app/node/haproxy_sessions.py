"""Lines of HAProxy's configuration that send a conversation's requests to one of several replicas.

HAProxy hashes a text that stays the same in a conversation, and the hash chooses the replica. With
consistent hashing, a replica that comes or goes moves only its own share of the conversations. The
text is the first of these in a request:

    the header `x-session-id`
    the field of the body that `protocol/session.py` chooses
    the first bytes of the body, if its first 15 kB, which HAProxy reads, have no such field

A new conversation goes to the replica of its hash, or to the next one on the ring if that replica
has `NEW_LOAD` percent of the mean number of requests. A stick table remembers the replica of each
conversation. The replica keeps the conversation until it has more than `KEEP_LOAD` percent of the
mean plus `KEEP_MORE` requests.

Each HAProxy has its own table. Serve restarts HAProxy with an empty table when a replica comes or
goes; then the hash finds the replica of most conversations again.

Requests for other routes than generation have no such text and go to the replicas in turn.
"""

import re
import zlib

from serve_app.protocol.session import (
    KEEP_LOAD,
    KEEP_MORE,
    NEW_LOAD,
    NUM_CHARS,
    NUM_KEPT,
    PLACES,
    SESSION_ID,
    SYSTEM_ROLES,
)

WEIGHT = 16
"""HAProxy's `weight` of a replica: it gets 16 places per unit on the ring of hashes. More places
make the shares more equal."""
KEPT_FOR = "1h"
"""Time after a conversation's last request at which its replica is forgotten."""
AFTER_SYSTEM = {
    None: "",
    True: f"{{ var(txn.role) -m str {' '.join(SYSTEM_ROLES)} }}",
    False: f"!{{ var(txn.role) -m str {' '.join(SYSTEM_ROLES)} }}",
}
"""HAProxy's condition for each value of `after_system` in `PLACES`."""


def rules() -> list[str]:
    """Returns the lines for the section of the server's port, after the body's first part is
    there."""
    chars = f"bytes(0,{NUM_CHARS})"
    in_body = [
        f"var(txn.body),json_query('{path}'),{chars} if generates !has_session "
        f"{AFTER_SYSTEM[after_system]}".rstrip()
        for path, after_system in PLACES
    ]
    lines = [
        "acl has_session var(txn.session) -m found",
        # HAProxy reads no `\u4f60` in a string; `\\x5c` is the backslash.
        r"http-request set-var(txn.body) 'req.body,regsub(\\x5cu,u,g)' if generates",
        "http-request set-var(txn.role) var(txn.body),json_query('$.messages[0].role')"
        " if generates",
        f"http-request set-var(txn.session) req.fhdr({SESSION_ID}),{chars} if generates "
        f"{{ req.fhdr({SESSION_ID}) -m found }}",
        *(f"http-request set-var(txn.session) {expression}" for expression in in_body),
        f"http-request set-var(txn.session) req.body,{chars} if generates !has_session",
        "http-request unset-var(txn.body)",
        # The table contains hashes, because HAProxy's tools show it to administrators.
        "http-request set-var(txn.session) var(txn.session),sha1 if generates",
    ]
    return [f"    {line}" for line in lines]


def num_replicas(config: str) -> int:
    """Returns the number of replicas in Serve's configuration, without Serve's spare proxy."""
    return len(_servers(config))


def balanced(config: str, backend: str) -> str:
    """Returns Serve's configuration `config` with a choice of the replica by conversation in
    section `backend`."""
    # By default a replica's number on the ring is its place in the file, which changes with others.
    numbers = {name: zlib.crc32(name.encode()) & 0x7FFFFFFF or 1 for _, name in _servers(config)}
    for line, name in _servers(config):
        config = config.replace(line, f"{line} id {numbers[name]} weight {WEIGHT}")
    lines = (
        f"backend {backend}",
        f"    stick-table type binary len 20 size {NUM_KEPT} expire {KEPT_FOR}",
        *_load(backend, numbers),
        "    stick match var(txn.session) if { var(txn.load),sub(txn.limit) le 0 }",
        "    stick store-request var(txn.session)",
        "    balance hash var(txn.session)",
        "    hash-type consistent sdbm avalanche",
        f"    hash-balance-factor {NEW_LOAD}",
    )
    return config.replace(f"backend {backend}\n", "\n".join(lines) + "\n")


def _load(backend: str, numbers: dict[str, int]) -> list[str]:
    """Returns lines that set `load`, the requests of the conversation's replica, and `limit`, the
    maximum load with which it keeps the conversation. `numbers` are the replicas' ids by name."""
    lines = [
        f"set-var(txn.kept) var(txn.session),table_server_id({backend})",
        *(
            f"set-var(txn.load) srv_conn({backend}/{name}) if {{ var(txn.kept) -m int {number} }}"
            for name, number in numbers.items()
        ),
        f"set-var(txn.num_up) nbsrv({backend}),mul(100)",
        # `be_conn` has this request too.
        f"set-var(txn.limit) be_conn({backend}),mul({KEEP_LOAD}),div(txn.num_up),add({KEEP_MORE})",
    ]
    return [f"    http-request {line}" for line in lines]


def _servers(config: str) -> list[tuple[str, str]]:
    """Returns the line and the name of each replica."""
    matches = re.finditer(r"^    server (\S+) .*$", config, re.MULTILINE)
    return [(match[0], match[1]) for match in matches if not match[0].endswith(" backup")]
