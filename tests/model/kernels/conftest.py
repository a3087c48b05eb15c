"""Makes Triton's interpreter faster for the tests of the kernels.

The interpreter replaces the functions of `triton.language` by its own when a kernel starts, and
again in every call of a device function, which finds nothing left to replace and takes a third of
the time. Here it does so once for each module in each launch.
"""

from typing import Any

from triton.runtime import interpreter

_execute = interpreter.GridExecutor.__call__
_seen: set[int] = set()
"""The globals of the functions that this launch has prepared, by `id`."""


def _launch(self: Any, *args: Any, **kwargs: Any) -> None:
    _seen.clear()
    _execute(self, *args, **kwargs)


def _call_device_function(self: Any, *args: Any, **kwargs: Any) -> Any:
    names = self.fn.__globals__
    if id(names) not in _seen:
        interpreter._patch_lang(self.fn)
        _seen.add(id(names))
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


interpreter.GridExecutor.__call__ = _launch
interpreter.InterpretedFunction.__call__ = _call_device_function
