"""Runs a function with a stack that is large enough for deeply nested grammars.

llguidance compiles a grammar recursively. A chain of a thousand `$ref`s needs more than the usual
stack of 8 MB, and the overflow would end the whole process.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

STACK_BYTES = 512 * 1024 * 1024
"""Size of the stack. The longest chains in 100,000 characters need about 50 MB. The system
allocates memory only for the used part, and frees it when the thread ends."""
T = TypeVar("T")


def with_large_stack(function: Callable[[], T]) -> T:
    """Returns `function()`, called in a new thread. Raises the errors of `function`."""
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar-stack")
    old_size = threading.stack_size(STACK_BYTES)
    try:
        future = executor.submit(function)  # starts the thread
    finally:
        threading.stack_size(old_size)
    executor.shutdown()
    return future.result()
