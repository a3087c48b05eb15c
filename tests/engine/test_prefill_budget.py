"""The budget, on a simulated device whose times are known."""

import random
from dataclasses import dataclass

import pytest

from serve_app.engine.prefill_budget import MAX_SLOWDOWN, PrefillBudget

MOST = 512


@dataclass
class Device:
    """Steps take `base` and something for each decode and each prompt token, in milliseconds; a
    prompt's token costs twice as much for every `stretch` tokens before it."""

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
    """The seconds of each step that a prompt of so many tokens takes."""
    steps: list[float] = []
    done = 0
    while done < length:
        tokens = min(budget.max_tokens(num_decodes), length - done)
        seconds = device.seconds(num_decodes, tokens, done)
        budget.observe(num_decodes, tokens, seconds)
        steps.append(seconds)
        done += tokens
    return steps


def warmed_up(device: Device, num_decodes: int) -> PrefillBudget:
    """After a prompt alone, and a decode of so many."""
    budget = PrefillBudget(MOST)
    run_prompt(budget, device, MOST, num_decodes=0)
    budget.observe(num_decodes, 0, device.seconds(num_decodes, 0, 0))
    return budget


@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize("num_decodes", [1, 16, 64])
def test_streams_keep_their_pace_beside_a_long_prompt(num_decodes: int, noise: float) -> None:
    """No step takes much more than the allowed slowdown, and the prompt is done within three times
    its time alone."""
    device = Device(noise=noise)
    alone = sum(run_prompt(PrefillBudget(MOST), device, 8192, num_decodes=0))
    steps = run_prompt(warmed_up(device, num_decodes), device, 8192, num_decodes)
    decode = device.seconds(num_decodes, 0, 0)
    assert max(steps) < decode * (MAX_SLOWDOWN + 0.1) * (1 + noise)
    assert sum(steps) < 3 * alone


def test_a_prompt_that_keeps_nobody_waiting_gets_whole_steps() -> None:
    """Whatever was measured beside streams."""
    budget = warmed_up(Device(), 16)
    run_prompt(budget, Device(), 4096, num_decodes=16)
    assert budget.max_tokens(0) == MOST


def test_a_prompt_always_gets_on() -> None:
    """Where decodes seem to take no time, or prompts for ever, it gets a small part of a step."""
    budget = PrefillBudget(MOST)
    budget.observe(4, 0, 1e-9)
    budget.observe(4, 10, 100.0)
    assert budget.max_tokens(4) == MOST // 32


def test_more_streams_than_were_ever_measured_are_taken_for_fewer() -> None:
    """What is not known is guessed on the side of the streams."""
    device = Device(decode=1.0)
    budget = warmed_up(device, 2)
    few = budget.max_tokens(2)
    assert budget.max_tokens(50) == few
    budget.observe(50, 0, device.seconds(50, 0, 0))
    assert budget.max_tokens(50) > few
    assert budget.max_tokens(2) == few


def test_a_device_that_becomes_slower_is_noticed() -> None:
    """Ten steps after prompts began to cost four times as much, they get less of each step."""
    budget = warmed_up(Device(), 16)
    before = budget.max_tokens(16)
    run_prompt(budget, Device(token=0.12), 10 * before, num_decodes=16)
    assert budget.max_tokens(16) < before / 3
