"""Lines of HAProxy's configuration that send a conversation's requests to one of several replicas.

HAProxy hashes a text that stays the same in a conversation, and the hash chooses the replica
(consistent hashing: a replica that comes or goes moves its own share of the conversations alone).
The text is the first of these that a request has:

    the header `x-session-id`
    what `protocol/session.py` finds in the body
    the first bytes of the body, where HAProxy cannot read it: a first message beyond the 15 kB that
    it has of a body

A replica that has `MAX_LOAD` percent of the mean of requests takes no more of them. They go to the
next one.

Requests that generate nothing have no such text, and go to the replicas by turns.
"""

import re
import zlib

from serve_app.protocol.session import MAX_LOAD, NUM_CHARS, PLACES, SESSION_ID, SYSTEM_ROLES

WEIGHT = 16
"""Number of places of a replica on the ring of hashes, in units of HAProxy's 16; more places make
the shares more equal."""
AFTER_SYSTEM = {
    None: "",
    True: f"{{ var(txn.role) -m str {' '.join(SYSTEM_ROLES)} }}",
    False: f"!{{ var(txn.role) -m str {' '.join(SYSTEM_ROLES)} }}",
}
"""HAProxy's condition for a place; `json_query` finds strings, not lists."""


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
        *(f"http-request set-var(txn.session) {each}" for each in in_body),
        f"http-request set-var(txn.session) req.body,{chars} if generates !has_session",
        "http-request unset-var(txn.body)",
    ]
    return [f"    {line}" for line in lines]


def num_replicas(config: str) -> int:
    """Returns the number of replicas in Serve's configuration, without Serve's spare proxy."""
    return len(_servers(config))


def balanced(config: str, backend: str) -> str:
    """Returns Serve's configuration `config` with a hash that chooses the replica in section
    `backend`."""
    lines = (
        f"backend {backend}",
        "    balance hash var(txn.session)",
        "    hash-type consistent sdbm avalanche",
        f"    hash-balance-factor {MAX_LOAD}",
    )
    config = config.replace(f"backend {backend}\n", "\n".join(lines) + "\n")
    # By default a replica's number on the ring is its place in the file, which changes with others.
    for line, name in _servers(config):
        number = zlib.crc32(name.encode()) & 0x7FFFFFFF or 1
        config = config.replace(line, f"{line} id {number} weight {WEIGHT}")
    return config


def _servers(config: str) -> list[tuple[str, str]]:
    """Returns the line and the name of each replica."""
    found = re.finditer(r"^    server (\S+) .*$", config, re.MULTILINE)
    return [(each[0], each[1]) for each in found if not each[0].endswith(" backup")]
