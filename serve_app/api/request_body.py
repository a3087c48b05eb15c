"""BodyReader: reads the JSON body of an HTTP request: limited in size, decompressed, in UTF-8."""

import asyncio
import json
import re
import time
import zlib
from collections.abc import AsyncIterable, Mapping
from typing import Any, NoReturn

from serve_app.errors import InvalidRequest, QueueFull, RequestTooLarge, UnsupportedEncoding

MAX_BODY_ON_LOOP = 100_000
"""Maximum bytes of a body that is parsed on the event loop. Larger and compressed bodies are parsed
in a thread, one after another."""

NUM_LARGEST = 8
"""Maximum bytes of all bodies in memory, as a multiple of the limit of one body. A body of up to
`MAX_BODY_ON_LOOP` bytes is never refused."""
MAX_VALUES = 1_000_000
"""Maximum total cost of the values in one body, by `COSTS`. The parser holds Python's lock for
about 50 ns per unit, so for at most 50 ms."""
COSTS = {b",": 1, b"[": 3, b"{": 3, b":": 14}
"""The cost of a value, an array, an object and a key, by the character that indicates it."""
PARSING_SHARE = 0.25
"""Share of the time in which large bodies may be parsed."""
MAX_PAUSE_S = 1.0
"""Maximum pause in seconds between the parsing of two large bodies."""
SLICE_BYTES = 65_536
"""Size of the slices in which a body is searched for strings; other requests run between slices."""

_WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}
"""The `wbits` of zlib for each content coding (RFC 9110, section 8.4.1)."""
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_WHOLE_STRINGS = re.compile(rb'(?:[^"]++|"(?:[^"\\]++|\\.)*+")*+', re.DOTALL)
"""The longest prefix that does not end inside a string."""
_RAW_DEFLATE = -15
"""`wbits` for clients that omit zlib's header, which `deflate` should have."""


class BodyReader:
    """Reads the bodies of one server's requests, and limits the memory that they use together."""

    def __init__(self, max_bytes: int, retry_after_s: int) -> None:
        """`max_bytes` is the limit of one body; all bodies together may have `NUM_LARGEST` times
        as many. `retry_after_s` is for the error of too many bodies."""
        self._max_bytes = max_bytes
        self._retry_after_s = retry_after_s
        self._num_bytes = 0
        # One at a time: a parsed body takes many times the memory of its bytes, and parsing holds
        # Python's lock.
        self._parsing = asyncio.Semaphore(1)
        self._pauses_until = 0.0

    async def read(self, headers: Mapping[str, str], stream: AsyncIterable[bytes]) -> Any:
        """Returns the JSON value of the body in `stream`; None for an empty body.

        `headers` are the request's; the case of their names does not matter. Raises
        `RequestTooLarge` as soon as the body, compressed or decompressed, exceeds its limit,
        `QueueFull` if all bodies together exceed theirs, `UnsupportedEncoding`, and
        `InvalidRequest`.
        """
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > self._max_bytes:
            raise _too_large(self._max_bytes)
        coding = headers.get("content-encoding")
        compression = None if coding is None else _compression(coding)
        held = 0
        parts: list[bytes] = []
        try:
            async for part in stream:
                held += len(part)
                self._num_bytes += len(part)
                if held > self._max_bytes:
                    raise _too_large(self._max_bytes)
                if held > MAX_BODY_ON_LOOP:
                    self._require_room()
                parts.append(part)
            body = b"".join(parts)
            if compression is not None or len(body) > MAX_BODY_ON_LOOP:
                return await self._parsed_in_turn(body, compression)
            return parsed(body)
        finally:
            self._num_bytes -= held

    async def _parsed_in_turn(self, body: bytes, compression: str | None) -> Any:
        """Parses in a thread, and starts the next body after a pause."""
        async with self._parsing:
            await asyncio.sleep(max(self._pauses_until - time.monotonic(), 0.0))
            began = time.monotonic()
            try:
                return await asyncio.to_thread(_value, body, compression, self._max_bytes)
            finally:
                now = time.monotonic()
                pause_s = (now - began) * (1 / PARSING_SHARE - 1)
                self._pauses_until = now + min(pause_s, MAX_PAUSE_S)

    def _require_room(self) -> None:
        if self._num_bytes > NUM_LARGEST * self._max_bytes:
            raise QueueFull(
                "Too many large requests arrive at once; send this one again a little later.",
                retry_after_s=self._retry_after_s,
            )


def _compression(header: str) -> str | None:
    """Returns the compression that the header Content-Encoding names, a key of `_WINDOW_BITS`; None
    for a body as it is."""
    coding = header.strip().lower()
    if coding not in ("", "identity", *_WINDOW_BITS):
        raise UnsupportedEncoding(
            "Send the body as it is, or with Content-Encoding gzip or deflate."
        )
    return coding if coding in _WINDOW_BITS else None


def _value(body: bytes, compression: str | None, max_bytes: int) -> Any:
    """Returns the JSON value of a body that is compressed unless `compression` is None."""
    if body and compression is not None:
        body = _unpacked(body, compression, max_bytes)
    # Strings may contain the counted characters too. Only a body above the limit is counted without
    # its strings, because that is slower.
    if _cost(body) > MAX_VALUES and _cost_without_strings(body) > MAX_VALUES:
        raise InvalidRequest(
            f"The body has more than the {MAX_VALUES} values that are allowed, where an array or "
            f"an object counts as {COSTS[b'[']} and a key as {COSTS[b':']}; send fewer at once."
        )
    return parsed(body)


def _cost(text: bytes) -> int:
    return sum(text.count(character) * cost for character, cost in COSTS.items())


def _cost_without_strings(body: bytes) -> int:
    """Returns the cost of everything except strings. Stops counting above `MAX_VALUES`.

    Example: `{"a": [1, 2]}` costs 3 for the object, 14 for the key, 3 for the array and 1 for the
    comma: 21.
    """
    cost = begin = 0
    while begin < len(body) and cost <= MAX_VALUES:
        match = _WHOLE_STRINGS.match(body, begin, begin + SLICE_BYTES)
        end = begin if match is None else match.end()
        if end > begin:
            cost += _cost(_STRING.sub(b"", body[begin:end]))
        elif (long := _STRING.match(body, begin)) is not None:
            end = long.end()
        else:
            break  # the parser says where the string begins that does not end
        begin = end
    return cost


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
    """Returns the JSON value of a body; None for an empty body. Raises `InvalidRequest`."""
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
