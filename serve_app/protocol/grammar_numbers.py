"""Refuses numbers in JSON schemas that llguidance 1.9.1 cannot take.

It rounds an integer below -2^63 to -2^63, for which it recurses until the stack ends the process.
It combines the `multipleOf` of a value to their least common multiple, and the time to compile it
grows with that number without a limit.
"""

import json
import math
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from serve_app.errors import InvalidRequest
from serve_app.protocol.grammar_source import GrammarSource

MIN_NUMBER = -(2**63) + 4096
"""The smallest number in a schema. As a 64-bit float it is above -2^63."""
MAX_MULTIPLE = 100_000
"""The largest least common multiple of all `multipleOf` of a schema, without their decimal points.
Its grammar takes half a second."""
_JSON = re.compile(r"%json\s*")
"""The beginning of a JSON schema in a Lark grammar."""


def check_numbers(source: GrammarSource) -> None:
    """Raises `InvalidRequest` if a schema in `source` has numbers that llguidance cannot take."""
    schemas = list(_schemas(source))
    multiples = set[Fraction]()
    for value in _values(schemas):
        if isinstance(value, dict):
            multiple = value.get("multipleOf")
            if isinstance(multiple, int | float) and 0 < multiple < math.inf:
                # The text of 0.1 is a tenth, the float is not.
                text_or_int = str(multiple) if isinstance(multiple, float) else multiple
                multiples.add(Fraction(text_or_int))
        elif isinstance(value, int | float) and value < MIN_NUMBER:
            raise InvalidRequest(
                f"`{source.field}` has a number below {MIN_NUMBER}, which is not supported.",
                param=source.field,
            )
    if _least_common_multiple(multiples) > MAX_MULTIPLE:
        raise InvalidRequest(
            f"`{source.field}` has `multipleOf` with numbers that are too large together.",
            param=source.field,
        )
    if source.kind == "tools" and (answer := schemas[0]["answer"]) is not None:
        check_numbers(GrammarSource(*answer))


def _schemas(source: GrammarSource) -> Iterator[Any]:
    """Yields the JSON values of `source` that have its schemas."""
    if source.kind in ("json", "tools"):
        yield json.loads(source.text)
    elif source.kind == "lark":
        for match in _JSON.finditer(source.text):
            try:
                yield json.JSONDecoder().raw_decode(source.text, match.end())[0]
            except (ValueError, RecursionError):
                continue  # llguidance refuses it


def _values(roots: list[Any]) -> Iterator[Any]:
    """Yields every value inside the JSON values `roots`, and themselves."""
    left = list(roots)
    while left:
        value = left.pop()
        yield value
        if isinstance(value, dict):
            left.extend(value.values())
        elif isinstance(value, list):
            left.extend(value)


def _least_common_multiple(numbers: set[Fraction]) -> int:
    """Returns the least common multiple of `numbers` times their common denominator.

    Example: 0.25 and 0.1 have the denominator 20, and 5 and 2 have the multiple 10.
    """
    scale = math.lcm(*(each.denominator for each in numbers))
    return math.lcm(*(int(each * scale) for each in numbers))
