"""Encodes a large JSON value in pieces, so that other threads wait for at most 1 ms.

Encoding the whole value at once would hold the interpreter's lock until the end.
"""

from typing import Any

import orjson

from serve_app.protocol.values import is_large


def encode(value: Any) -> bytes:
    """Returns `value` as JSON in UTF-8. Raises `TypeError` for values that JSON cannot represent.

    NaN and Infinity would become null, so callers must make numbers finite first.
    """
    if isinstance(value, dict) and is_large(value):
        items = (b"%b:%b" % (orjson.dumps(name), encode(item)) for name, item in value.items())
        return b"{%b}" % b",".join(items)
    if isinstance(value, list) and is_large(value):
        return b"[%b]" % b",".join(encode(item) for item in value)
    return orjson.dumps(value)
