"""Encodes a large JSON value in pieces, each of which keeps other threads waiting for 1 ms at most.

An encoder of the whole value holds the interpreter's lock until it has ended.
"""

from typing import Any

import orjson

from serve_app.protocol.values import is_large


def encode(value: Any) -> bytes:
    """`value` as JSON in UTF-8. Raises `TypeError` for what JSON does not have.

    NaN and Infinity would become null, so callers make numbers finite first.
    """
    if isinstance(value, dict) and is_large(value):
        items = (b"%b:%b" % (orjson.dumps(name), encode(each)) for name, each in value.items())
        return b"{%b}" % b",".join(items)
    if isinstance(value, list) and is_large(value):
        return b"[%b]" % b",".join(encode(each) for each in value)
    return orjson.dumps(value)
