"""`bitsandbytes.functional`, imported in half the time."""

from functools import cache
from typing import Any

import pytest


@cache
def functional() -> Any:
    """Returns the module. Its functions for a CPU run as they are written.

    bitsandbytes compiles some of them with `torch.compile`, for which the import alone loads
    torch._dynamo and torch._inductor: seconds of every test process.
    """
    import torch

    def as_written(function: Any = None, **_: Any) -> Any:
        return function or as_written

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", as_written)
        from bitsandbytes import functional as module
    return module
