"""Refuses numbers in JSON schemas that llguidance 1.9.1 cannot take.

It rounds numbers to 64-bit floats, and an integer below -2^63 to -2^63, for which it recurses until
the stack ends the process. It combines the `multipleOf` of a value to their least common multiple,
and the time to compile it grows with that number without a limit. For `minProperties` see
`exact_keywords`, which makes other numbers fit.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any

from serve_app.errors import InvalidRequest
from serve_app.protocol.exact_keywords import (
    BOUNDS,
    MAX_EXACT,
    MAX_NUMBER,
    is_number,
    max_min_properties,
)

MAX_MULTIPLE = 100_000
"""The largest least common multiple of all `multipleOf` of a schema, without their decimal points.
Its grammar takes half a second."""
_JSON = re.compile(r"%json\s*")
"""The beginning of a JSON schema in a Lark grammar."""


def check_numbers(grammars: list[dict[str, Any]], field: str) -> None:
    """Raises `InvalidRequest` if a schema in llguidance's `grammars` has numbers that it cannot
    take. `field` is the request field of the grammars."""
    multiples = set[Fraction]()
    for value in _values(schema for each in grammars for schema in _schemas(each)):
        if isinstance(value, dict):
            multiple = value.get("multipleOf")
            if is_number(multiple) and 0 < multiple < math.inf:
                # The text of 0.1 is a tenth, the float is not.
                text_or_int = str(multiple) if isinstance(multiple, float) else multiple
                multiples.add(Fraction(text_or_int))
            reason = _wrong_number(value)
        else:
            is_below = is_number(value) and value < -MAX_NUMBER
            reason = f"a number below {-MAX_NUMBER}, which is not supported" if is_below else ""
        if reason:
            raise InvalidRequest(f"`{field}` has {reason}.", param=field)
    if _least_common_multiple(multiples) > MAX_MULTIPLE:
        raise InvalidRequest(
            f"`{field}` has `multipleOf` with numbers that are too large together.", param=field
        )


def _wrong_number(schema: dict[str, Any]) -> str:
    """Returns what is wrong with the numbers of `schema`; an empty text if nothing is."""
    for key in ("const", "enum"):
        for value in _values([schema.get(key)]):
            if is_number(value) and MAX_EXACT < abs(value) < math.inf:
                return f"a number beyond 2^53 in `{key}`, which is not supported"
    for key in BOUNDS:
        bound = schema.get(key)
        if is_number(bound) and (bound > MAX_NUMBER or int(float(bound)) != int(bound)):
            return f"a number in `{key}` that is not supported"
    least = schema.get("minProperties")
    if is_number(least) and least > max_min_properties(schema):
        return "`minProperties` that exceeds the number of `required` properties by more than one"
    return ""


def _schemas(grammar: dict[str, Any]) -> Iterator[Any]:
    """Yields the JSON schemas of one of llguidance's grammars."""
    yield grammar.get("json_schema")
    lark = grammar.get("lark_grammar", "")
    for match in _JSON.finditer(lark):
        try:
            yield json.JSONDecoder().raw_decode(lark, match.end())[0]
        except (ValueError, RecursionError):
            continue  # llguidance refuses it


def _values(roots: Iterable[Any]) -> Iterator[Any]:
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
