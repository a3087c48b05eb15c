# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""A Triton kernel that reads memory and writes next to nothing."""

import triton
import triton.language as tl
from torch import Tensor


def read(source: Tensor, sums: Tensor) -> None:
    """Fills `sums` int32 `[n]` with the sums of n equal parts of `source`, int32, which must be a
    power of two of words each."""
    _read[(len(sums),)](source, sums, WORDS=len(source) // len(sums), num_warps=8)


@triton.jit
def _read(source, sums, WORDS: tl.constexpr):
    program = tl.program_id(0)
    words = tl.load(source + program.to(tl.int64) * WORDS + tl.arange(0, WORDS))
    tl.store(sums + program, tl.sum(words, 0))
