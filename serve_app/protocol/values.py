"""Reads parsed JSON values from clients, in a thread where they are large."""

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

LARGE = 20_000
"""Characters and values; reading more of them delays other requests noticeably."""


async def read(function: Callable[[Any], T], value: Any) -> T:
    """`function(value)`; in a thread where `value` is large, so that the event loop goes on."""
    return await asyncio.to_thread(function, value) if is_large(value) else function(value)


def is_large(value: Any) -> bool:
    """Returns whether `value` has more than `LARGE` characters and values; looks at no more of
    them."""
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
