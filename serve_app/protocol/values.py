"""JSON values from strangers, once they are parsed: how large, and whether they may go on.

Both walk in Python, step by step: in a thread they leave the interpreter to others, as `json.dumps`
would not. Knows no fields.
"""

import math
import re
from collections.abc import Iterable
from itertools import chain
from typing import Any

LARGE = 20_000
"""Characters and values that take long enough to read to be felt by others."""

_SURROGATE = re.compile("[\ud800-\udfff]")


def is_large(value: Any) -> bool:
    """Whether `value` has more than `LARGE` characters and values; looks at no more of them."""
    size, waiting = 0, [value]
    while waiting and size <= LARGE:
        each = waiting.pop()
        if isinstance(each, str | list | dict):
            size += len(each)
        if size <= LARGE:
            waiting.extend(_inside(each))
    return size > LARGE


def is_plain(value: Any) -> bool:
    """Whether `value` is JSON in UTF-8: no NaN, no Infinity, no lone surrogate."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if not _is_plain(each):
            return False
        waiting.extend(_inside(each))
    return True


def _inside(value: Any) -> Iterable[Any]:
    """The values that `value` is made of."""
    if isinstance(value, dict):
        return chain(value, value.values())
    return value if isinstance(value, list) else ()


def _is_plain(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, str):
        return value.isascii() or not _SURROGATE.search(value)
    return value is None or isinstance(value, int | list | dict)
