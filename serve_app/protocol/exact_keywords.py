"""Rewrites keywords of a JSON schema that llguidance 1.9.1 holds wrongly or refuses without need.

- Bounds are 64-bit floats there, and integers below 2^63. A bound that is not is rounded to a
  smaller range. Some exclusive bounds are inclusive there: 1 beside a maximum of 1.5, and those
  from 2^53 on. They become the next float, inclusive.
- In a string with a `pattern`, a class that allows all control characters also allows the escapes
  of `"` and of a backslash: `[^"]` allows a quote. Classes lose the character NUL.
- Beside `prefixItems`, `additionalItems` has an effect there; JSON schema has no such keyword.
- The names of additional properties may repeat, and a repeated one counts again for
  `minProperties`. If a schema is lenient, the number becomes one that needs no second name.
- A `$ref` such as `#/$defs/Größe` is refused there unless it is encoded as a URI.
"""

import math
import re
from typing import Any, TypeGuard
from urllib.parse import quote

from serve_app.protocol.schema_tree import mapped

MAX_NUMBER = 2**63 - 4096
"""The largest bound, and with a minus the smallest."""
MAX_EXACT = 2**53
"""Up to this number every integer is a 64-bit float."""
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
URI_CHARS = "/#%?:@!$&'()*+,;=~"
"""Characters besides letters, digits and `-._` that a URI may have."""
LEAST = 1e-15
"""The number that follows 0; the next float has 324 digits."""
_FROM_NUL = re.compile(r"\\(?:x00|u0000)-|\\.|\[\^\]?", re.DOTALL)
"""A range from NUL, another escape, or the beginning of a negated class."""


def with_exact(schema: dict[str, Any], *, lenient: bool) -> dict[str, Any]:
    """Returns `schema` with keywords that llguidance holds."""
    new: dict[str, Any] = mapped(schema, lambda each: _exact(each, lenient))
    return new


def max_min_properties(schema: dict[str, Any]) -> int:
    """Returns the largest `minProperties` that llguidance holds."""
    required = schema.get("required")
    return 1 + (len(set(map(str, required))) if isinstance(required, list) else 0)


def is_number(value: Any) -> TypeGuard[float]:
    """Returns whether a JSON value is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _exact(schema: dict[str, Any], lenient: bool) -> dict[str, Any]:
    if not isinstance(schema.get("items"), list):
        schema.pop("additionalItems", None)
    if isinstance(reference := schema.get("$ref"), str):
        schema["$ref"] = quote(reference, safe=URI_CHARS)
    if isinstance(pattern := schema.get("pattern"), str):
        schema["pattern"] = _without_nul(pattern)
    if isinstance(named := schema.get("patternProperties"), dict):
        schema["patternProperties"] = {_without_nul(key): value for key, value in named.items()}
    if lenient and is_number(least := schema.get("minProperties")):
        schema["minProperties"] = min(least, max_min_properties(schema))
    for key in ("minimum", "exclusiveMinimum"):
        if is_number(value := schema.get(key)):
            schema[key] = -_rounded(-value)
    for key in ("maximum", "exclusiveMaximum"):
        if is_number(value := schema.get(key)):
            schema[key] = _rounded(value)
    _include(schema, "exclusiveMinimum", "minimum", math.inf)
    _include(schema, "exclusiveMaximum", "maximum", -math.inf)
    return schema


def _without_nul(pattern: str) -> str:
    """Returns `pattern` with ranges from U+0001, and negated classes that exclude NUL."""
    return _FROM_NUL.sub(_replacement, pattern)


def _replacement(found: re.Match[str]) -> str:
    if found[0][0] == "[":
        return found[0] + r"\x00"
    return r"\x01-" if len(found[0]) > 2 else found[0]


def _rounded(bound: float) -> float:
    """Returns the largest 64-bit float up to `bound` and `MAX_NUMBER`."""
    if not -MAX_NUMBER <= bound < math.inf:
        return bound
    bound = min(bound, MAX_NUMBER)
    below = float(bound)
    if below > bound:
        below = math.nextafter(below, -math.inf)
    return int(below) if isinstance(bound, int) else below


def _include(schema: dict[str, Any], exclusive: str, inclusive: str, upwards: float) -> None:
    """Replaces the bound `exclusive` with the next float where llguidance includes it."""
    bound = schema.get(exclusive)
    if not is_number(bound) or not (
        abs(bound) >= MAX_EXACT or _has_close_limit(schema, bound, upwards)
    ):
        return
    del schema[exclusive]
    following = math.nextafter(bound, upwards) if bound else math.copysign(LEAST, upwards)
    found = [following, *filter(is_number, [schema.get(inclusive)])]
    schema[inclusive] = max(found) if upwards > 0 else min(found)


def _has_close_limit(schema: dict[str, Any], bound: float, upwards: float) -> bool:
    """Returns whether numbers have the integer `bound` before the decimal point, for example those
    above 1 and below 1.5."""
    limits = [value for name in BOUNDS if is_number(value := schema.get(name))]
    sign = math.copysign(1, upwards)
    is_whole = bound == int(bound) and bound * sign >= 0
    return is_whole and any(0 < (limit - bound) * sign < 1 for limit in limits)
