"""Reads the JSON body of an HTTP request: limited in size, unpacked, in UTF-8."""

import asyncio
import json
import zlib
from typing import Any, NoReturn

from starlette.requests import Request

from serve_app.errors import InvalidRequest, RequestTooLarge, UnsupportedEncoding

MAX_BODY_ON_LOOP = 100_000
"""Bytes; larger bodies are parsed in a thread, as are all packed ones."""

_WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}
"""The `wbits` of zlib for each content coding (RFC 9110, section 8.4.1)."""
_RAW_DEFLATE = -15
"""Some clients leave out zlib's header, which `deflate` should have."""


async def read(request: Request, max_bytes: int) -> Any:
    """The JSON value of the body; None for an empty body.

    Raises `RequestTooLarge` as soon as the body, packed or unpacked, is known to be larger than
    `max_bytes`, `UnsupportedEncoding`, and `InvalidRequest`.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > max_bytes:
        raise _too_large(max_bytes)
    encoding = request.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity", *_WINDOW_BITS):
        raise UnsupportedEncoding(
            "Send the body as it is, or with Content-Encoding gzip or deflate."
        )
    parts: list[bytes] = []
    num_bytes = 0
    async for part in request.stream():
        num_bytes += len(part)
        if num_bytes > max_bytes:
            raise _too_large(max_bytes)
        parts.append(part)
    body = b"".join(parts)
    if body and encoding in _WINDOW_BITS:
        body = await asyncio.to_thread(_unpacked, body, encoding, max_bytes)
    if len(body) > MAX_BODY_ON_LOOP:
        return await asyncio.to_thread(parsed, body)
    return parsed(body)


def _unpacked(body: bytes, encoding: str, max_bytes: int) -> bytes:
    bits = _WINDOW_BITS[encoding]
    # zlib's header has the method in its first byte and is a multiple of 31.
    if encoding == "deflate" and (body[0] & 15 != 8 or int.from_bytes(body[:2]) % 31):
        bits = _RAW_DEFLATE
    unpacker = zlib.decompressobj(bits)
    try:
        unpacked = unpacker.decompress(body, max_bytes + 1)
    except zlib.error:
        raise InvalidRequest(f"The body is not valid {encoding} data.") from None
    if len(unpacked) > max_bytes:
        raise _too_large(max_bytes)
    if not unpacker.eof:
        raise InvalidRequest(f"The body ends in the middle of its {encoding} data.")
    return unpacked


def parsed(body: bytes) -> Any:
    """The JSON value of a body; None for an empty body. Raises `InvalidRequest`."""
    if not body.strip():
        return None
    try:
        # A byte order mark is no part of the text.
        return json.loads(body.decode("utf-8-sig"), parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise InvalidRequest("The body is not UTF-8.") from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(
            f"The body is not valid JSON: line {error.lineno}, column {error.colno}."
        ) from None
    except (ValueError, RecursionError):
        raise InvalidRequest(
            "The body holds a number or a nesting that JSON readers cannot take."
        ) from None


def _too_large(max_bytes: int) -> RequestTooLarge:
    return RequestTooLarge(f"The body is larger than the {max_bytes} bytes that are allowed.")


def _no_constant(name: str) -> NoReturn:
    raise InvalidRequest(f"The body is not valid JSON: {name} is not a JSON number.")
