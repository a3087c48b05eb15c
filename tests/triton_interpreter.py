"""Makes Triton's interpreter, in which tests run the kernels, faster without changing its results.

The interpreter replaces the functions of `triton.language` by its own when a kernel starts, and
again in every call of a device function. That finds nothing left to replace and takes a third of
the time. `prepare_once` makes it do so once for each module in each launch.
"""

from typing import Any

from triton.runtime import interpreter

_execute = interpreter.GridExecutor.__call__
_prepared: set[int] = set()
"""The modules whose functions this launch has prepared: `id` of their globals."""


def prepare_once() -> None:
    """Makes every later launch prepare each module once."""
    interpreter.GridExecutor.__call__ = _launch
    interpreter.InterpretedFunction.__call__ = _call_device_function


def _launch(self: Any, *args: Any, **kwargs: Any) -> None:
    _prepared.clear()
    _execute(self, *args, **kwargs)


def _call_device_function(self: Any, *args: Any, **kwargs: Any) -> Any:
    module = id(self.fn.__globals__)
    if module not in _prepared:
        interpreter._patch_lang(self.fn)
        _prepared.add(module)
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error
