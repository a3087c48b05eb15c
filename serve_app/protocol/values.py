"""Checks of parsed JSON values from clients: how large they are, and whether JSON can hold them.

Both walk the value step by step in Python: in a thread, they leave the interpreter's lock to the
event loop, which `json.dumps` would not.
"""

import asyncio
import math
import re
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

LARGE = 20_000
"""Characters and values; reading more of them delays other requests noticeably."""

_SURROGATE = re.compile("[\ud800-\udfff]")


async def read(function: Callable[[Any], T], value: Any) -> T:
    """`function(value)`; in a thread where `value` is large, so that the event loop goes on."""
    return await asyncio.to_thread(function, value) if is_large(value) else function(value)


def is_large(value: Any) -> bool:
    """Whether `value` has more than `LARGE` characters and values; looks at no more of them."""
    size, waiting = 0, [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, str | list | dict):
            size += len(each)
            if size > LARGE:
                return True
        if isinstance(each, dict):
            waiting.extend(each)
            waiting.extend(each.values())
        elif isinstance(each, list):
            waiting.extend(each)
    return False


def is_json(value: Any) -> bool:
    """Whether `value` is JSON in UTF-8: no NaN, no Infinity, no lone surrogate."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, str):
            if not each.isascii() and _SURROGATE.search(each):
                return False
        elif isinstance(each, float):
            if not math.isfinite(each):
                return False
        elif isinstance(each, dict):
            waiting.extend(each)
            waiting.extend(each.values())
        elif isinstance(each, list):
            waiting.extend(each)
        elif each is not None and not isinstance(each, int):
            return False
    return True
