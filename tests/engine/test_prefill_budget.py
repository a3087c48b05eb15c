"""The prefill budget, on a simulated device whose times are known."""

import random
from dataclasses import dataclass

import pytest

from serve_app.engine.prefill_budget import MAX_SLOWDOWN, PrefillBudget

MOST = 512


@dataclass
class Device:
    """A step takes `base`, `decode` per decode and `token` per prompt token, in milliseconds. A
    prompt token costs twice as much for every `stretch` tokens before it."""

    base: float = 4.0
    decode: float = 0.1
    token: float = 0.03
    stretch: float = 4096
    noise: float = 0.0

    def seconds(self, num_decodes: int, num_tokens: int, context: int) -> float:
        token = self.token * (1 + context / self.stretch)
        exact = (self.base + self.decode * num_decodes + token * num_tokens) / 1000
        return exact * random.Random(context).uniform(1, 1 + self.noise)


def run_prompt(budget: PrefillBudget, device: Device, length: int, num_decodes: int) -> list[float]:
    """Runs a prompt of `length` tokens; returns the seconds of each step."""
    steps: list[float] = []
    done = 0
    while done < length:
        tokens = min(budget.max_tokens(num_decodes), length - done)
        seconds = device.seconds(num_decodes, tokens, done)
        budget.observe(num_decodes, tokens, seconds)
        steps.append(seconds)
        done += tokens
    return steps


def measured(device: Device, num_decodes: int) -> PrefillBudget:
    """A budget that has measured a prompt alone and a step of `num_decodes` decodes."""
    budget = PrefillBudget(MOST)
    run_prompt(budget, device, MOST, num_decodes=0)
    budget.observe(num_decodes, 0, device.seconds(num_decodes, 0, 0))
    return budget


@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize("num_decodes", [1, 16, 64])
def test_streams_keep_their_pace_beside_a_long_prompt(num_decodes: int, noise: float) -> None:
    """No step exceeds the allowed slowdown by much, and the prompt takes at most three times as
    long."""
    device = Device(noise=noise)
    alone = sum(run_prompt(PrefillBudget(MOST), device, 8192, num_decodes=0))
    steps = run_prompt(measured(device, num_decodes), device, 8192, num_decodes)
    decode = device.seconds(num_decodes, 0, 0)
    assert max(steps) < decode * (MAX_SLOWDOWN + 0.1) * (1 + noise)
    assert sum(steps) < 3 * alone


def test_a_prompt_without_streams_gets_whole_steps() -> None:
    """Without decodes the limit is the largest step, whatever was measured beside streams."""
    budget = measured(Device(), 16)
    run_prompt(budget, Device(), 4096, num_decodes=16)
    assert budget.max_tokens(0) == MOST


def test_a_prompt_always_gets_its_smallest_share() -> None:
    """The limit is 1/32 of the largest step if decodes seem free or prompt tokens very slow."""
    budget = PrefillBudget(MOST)
    budget.observe(4, 0, 1e-9)
    budget.observe(4, 10, 100.0)
    assert budget.max_tokens(4) == MOST // 32


def test_an_unmeasured_number_of_streams_counts_as_fewer() -> None:
    """For more decodes than were measured, the limit is that of fewer decodes."""
    device = Device(decode=1.0)
    budget = measured(device, 2)
    few = budget.max_tokens(2)
    assert budget.max_tokens(50) == few
    budget.observe(50, 0, device.seconds(50, 0, 0))
    assert budget.max_tokens(50) > few
    assert budget.max_tokens(2) == few


def test_a_device_that_becomes_slower_is_noticed() -> None:
    """Ten steps after prompt tokens cost four times as much, the limit is under a third."""
    budget = measured(Device(), 16)
    before = budget.max_tokens(16)
    run_prompt(budget, Device(token=0.12), 10 * before, num_decodes=16)
    assert budget.max_tokens(16) < before / 3
