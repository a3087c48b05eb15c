"""Runs a function with a stack that is large enough for deeply nested grammars.

llguidance compiles a grammar recursively. A chain of a thousand `$ref`s exceeds the 8 MB of a usual
stack, which ends the whole process.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

STACK_BYTES = 512 * 1024 * 1024
"""The longest chains in 100,000 characters need about 50 MB. Memory is taken as it is used, and
returned when the thread ends."""
T = TypeVar("T")


def with_large_stack(function: Callable[[], T]) -> T:
    """Returns `function()`, called in a new thread. Raises what it raises."""
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar-stack")
    usual = threading.stack_size(STACK_BYTES)
    try:
        future = executor.submit(function)  # starts the thread
    finally:
        threading.stack_size(usual)
    executor.shutdown()
    return future.result()
