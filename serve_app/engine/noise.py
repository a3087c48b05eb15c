"""Gumbel noise as a pure function of seed, output position and token id.

The generator is counter-based: it has no state, so a seeded request draws the same numbers in any
batch and after a preemption. The bits are SplitMix64's (Steele, Lea and Flood, OOPSLA 2014).
"""

import torch
from torch import Tensor

# As signed 64-bit numbers, whose arithmetic wraps around in torch.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def gumbel(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise, float64 `[rows, vocab_size]`, for int64 `seeds`, `positions` `[rows]`.

    The argmax of logits plus this noise is a sample of their softmax (the Gumbel-max trick).
    float64, because the tail of the distribution decides, and because ties become impossible in
    practice.
    """
    keys = _mix(_mix(seeds.clone()) + positions * _GOLDEN)
    ids = torch.arange(vocab_size, device=seeds.device) * _GOLDEN
    bits = _shift_right(_mix(keys[:, None] + ids), 12)
    # 52 bits and a half: never 0 and never 1.
    uniform = bits.to(torch.float64).add_(0.5).mul_(2.0**-52)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def as_int64(seed: int) -> int:
    """The low 64 bits of any integer, as a signed 64-bit number."""
    return ((seed + (1 << 63)) % (1 << 64)) - (1 << 63)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finalizer. Overwrites `x`: new memory would cost more than the arithmetic."""
    x ^= _shift_right(x, 30)
    x *= _MIX_1
    x ^= _shift_right(x, 27)
    x *= _MIX_2
    x ^= _shift_right(x, 31)
    return x


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """The logical shift; torch's own keeps the sign."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)
