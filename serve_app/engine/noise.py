"""Gumbel noise as a pure function of seed, output position and token id.

The generator is counter-based and has no state, so a request with a seed gets the same noise in any
batch and after a preemption. The bits are SplitMix64's (Steele, Lea and Flood, OOPSLA 2014).

Example: with seed 7, the noise for the third output token (position 2) and token id 42 is always
the same number. It is computed in three steps:

    key     = mix(mix(7) + 2 * GOLDEN)         one 64-bit number per row
    bits    = mix(key + 42 * GOLDEN)           one 64-bit number per row and token id
    uniform = (top 52 bits + 0.5) / 2**52      between 0 and 1, both excluded
    noise   = -log(-log(1 - uniform))
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Signed 64-bit numbers; torch's int64 arithmetic wraps around.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def gumbel(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Returns standard Gumbel noise, float64 `[rows, vocab_size]`.

    `seeds` and `positions` are int64 `[rows]`. The argmax of logits plus this noise is a sample of
    their softmax (the Gumbel-max trick). float64 represents the tail of the distribution, which
    decides which token wins, and makes ties practically impossible.
    """
    # On a CPU numpy takes half the time of torch.
    compute = _gumbel_on_host if seeds.is_cpu else _gumbel_on_device
    return compute(seeds, positions, vocab_size)


def _gumbel_on_host(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    keys = seeds.numpy().view(np.uint64).copy()
    _mix_on_host(keys)
    keys += positions.numpy().view(np.uint64) * np.uint64(_GOLDEN % (1 << 64))
    _mix_on_host(keys)
    ids = np.arange(vocab_size, dtype=np.uint64) * np.uint64(_GOLDEN % (1 << 64))
    bits = keys[:, None] + ids
    _mix_on_host(bits)
    bits >>= np.uint64(12)
    # The top 52 bits plus a half: never 0 and never 1.
    noise = bits.astype(np.float64)
    noise += 0.5
    noise *= -(2.0**-52)
    np.log1p(noise, out=noise)
    np.negative(noise, out=noise)
    np.log(noise, out=noise)
    np.negative(noise, out=noise)
    return torch.from_numpy(noise)


def _mix_on_host(x: NDArray[np.uint64]) -> None:
    """Applies SplitMix64's finalizer to `x` in place."""
    shifted = np.empty_like(x)
    for bits, factor in ((30, _MIX_1), (27, _MIX_2), (31, None)):
        np.right_shift(x, np.uint64(bits), out=shifted)
        x ^= shifted
        if factor is not None:
            x *= np.uint64(factor % (1 << 64))


def _gumbel_on_device(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    keys = _mix(_mix(seeds.clone()) + positions * _GOLDEN)
    ids = torch.arange(vocab_size, device=seeds.device) * _GOLDEN
    bits = _shift_right(_mix(keys[:, None] + ids), 12)
    # The top 52 bits plus a half: never 0 and never 1.
    uniform = bits.to(torch.float64).add_(0.5).mul_(2.0**-52)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def as_int64(seed: int) -> int:
    """Returns the low 64 bits of any integer as a signed 64-bit number."""
    return ((seed + (1 << 63)) % (1 << 64)) - (1 << 63)


def _mix(x: Tensor) -> Tensor:
    """Applies SplitMix64's finalizer to `x` in place; an allocation would take longer than the
    arithmetic."""
    x ^= _shift_right(x, 30)
    x *= _MIX_1
    x ^= _shift_right(x, 27)
    x *= _MIX_2
    x ^= _shift_right(x, 31)
    return x


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Returns the logical right shift of `x`; torch's `>>` keeps the sign."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)
