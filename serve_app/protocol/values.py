"""Validates parsed JSON values of clients, in a thread if they are large."""

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

LARGE = 20_000
"""Number of characters and values above which validation would delay other requests noticeably."""


async def read(function: Callable[[Any], T], value: Any) -> T:
    """Returns `function(value)`, computed in a thread if `value` is large, to keep the event loop
    free."""
    return await asyncio.to_thread(function, value) if is_large(value) else function(value)


def is_large(value: Any) -> bool:
    """Returns whether `value` has more than `LARGE` characters and values. Stops counting there."""
    size, waiting = 0, [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str | list | dict):
            size += len(item)
            if size > LARGE:
                return True
        if isinstance(item, dict):
            waiting.extend(item)
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)
    return False
