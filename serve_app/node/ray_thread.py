"""A thread that calls Ray's blocking functions for an event loop.

The kernel ends Ray's processes together with the thread that started them (PR_SET_PDEATHSIG, which
applies to threads, not processes). The threads of an event loop end with the loop, before the last
jobs are answered. So this module has one thread that lives as long as the process. `serve_http`
needs none, because it calls Ray in the main thread.

If a process of Ray dies, the running call may never return. The thread is then abandoned: the next
call gets a new one, and `ended` ends the process without waiting for the old one.
tests/faults/test_worker.py and tests/faults/test_eager.py check this.
"""

import asyncio
import functools
import logging
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

_call: Future[Any] | None = None
"""The last call, which may have ended."""
_abandoned: list[ThreadPoolExecutor] = []


@functools.cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="ray")


def run(function: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
    """Calls `function` in Ray's thread while the event loop runs on."""
    global _call
    _call = _thread().submit(function, *arguments)
    return asyncio.wrap_future(_call)


def is_busy() -> bool:
    """Returns whether a call is running."""
    return _call is not None and not _call.done()


def leave() -> None:
    """Abandons the thread with its running call; the next call gets a new thread."""
    _abandoned.append(_thread())
    _thread.cache_clear()


def ended(code: int) -> int:
    """Returns `code`. If a thread was abandoned, ends the process with `code` instead.

    At its end, Python waits for every thread of a pool, so it would wait for an abandoned one
    without end.
    """
    if _abandoned:
        sys.stdout.flush()
        logging.shutdown()
        os._exit(code)
    return code
