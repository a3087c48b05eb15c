"""The counter-based random numbers, beside SplitMix64 in Python's own integers."""

import math
import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from serve_app.engine.noise import _gumbel_on_device, _gumbel_on_host, as_int64, gumbel

MASK = (1 << 64) - 1


def mix(x: int) -> int:
    """SplitMix64's finalizer, as published (xoshiro.di.unimi.it/splitmix64.c)."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def expected(seed: int, position: int, token_id: int) -> float:
    key = mix((mix(seed & MASK) + position * 0x9E3779B97F4A7C15) & MASK)
    bits = mix((key + token_id * 0x9E3779B97F4A7C15) & MASK) >> 12
    return -math.log(-math.log1p(-(bits + 0.5) / 2**52))


@pytest.mark.parametrize("gumbel", [_gumbel_on_host, _gumbel_on_device])
@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, 2**63, 2**64 - 1, 2**64 + 1])
def test_noise_is_the_published_function_of_seed_position_and_token(
    seed: int, gumbel: Callable[[Tensor, Tensor, int], Tensor]
) -> None:
    """Every number equals the pure Python one, signs and wrap-around included."""
    positions = [0, 1, 1000]
    noise = gumbel(torch.tensor([as_int64(seed)] * 3), torch.tensor(positions), 40)
    for row, position in enumerate(positions):
        for token_id in range(40):
            assert noise[row, token_id].item() == pytest.approx(expected(seed, position, token_id))


def test_noise_is_gumbel_and_uncorrelated() -> None:
    """Mean and variance are Euler's constant and pi^2/6; neighbours do not correlate."""
    noise = gumbel(torch.arange(40), torch.arange(40) // 3, 2000)
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.04)
    for a, b in ((noise[:, :-1], noise[:, 1:]), (noise[:-1], noise[1:])):
        correlation = statistics.correlation(a.flatten().tolist(), b.flatten().tolist())
        assert abs(correlation) < 0.015
