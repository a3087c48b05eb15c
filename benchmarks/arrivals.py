"""Loads for the simulated engine: which requests arrive when. Each call makes new requests."""

import random

from tools.simulated_engine import Arrival

PROMPTS = (200, 1000, 3000)
"""Lengths of mixed prompts, in tokens."""
ANSWER = 150


def poisson(rate: float, count: int) -> list[Arrival]:
    """Returns mixed prompts that arrive at random, `rate` per second."""
    draw, at = random.Random(1), 0.0
    arrivals = []
    for _ in range(count):
        at += draw.expovariate(rate)
        arrivals.append(Arrival(at, draw.choice(PROMPTS), ANSWER))
    return arrivals


def bursts(rate: float, count: int, size: int = 16) -> list[Arrival]:
    """Returns mixed prompts that arrive `size` at a time, `rate` per second on average."""
    draw = random.Random(2)
    times = [size / rate * (number // size) for number in range(count)]
    return [Arrival(at, draw.choice(PROMPTS), ANSWER) for at in times]


def conversations(count: int, turns: int = 6, pause_s: float = 0.2) -> list[Arrival]:
    """Returns conversations whose turns each add 160 tokens to all turns before."""
    firsts = []
    for number in range(count):
        turn = Arrival(pause_s, 160, 48)
        for _ in range(turns - 1):
            turn = Arrival(pause_s, 160, 48, then=turn)
        turn.at = 0.01 * number
        firsts.append(turn)
    return firsts


def long_beside_streams() -> list[Arrival]:
    """Returns one prompt of 7,400 tokens beside eight streams."""
    return [Arrival(0, 20, 1000) for _ in range(8)] + [Arrival(1, 7400, 10)]


def short_behind_long(rate: float) -> list[Arrival]:
    """Returns three prompts of 30,000 tokens, and prompts of 200 tokens that arrive at random,
    `rate` per second."""
    draw, at = random.Random(3), 0.0
    arrivals = []
    for _ in range(400):
        at += draw.expovariate(rate)
        arrivals.append(Arrival(at, 200, 100))
    return arrivals + [Arrival(at * share, 30_000, 100) for share in (0.1, 0.4, 0.7)]


def batch_beside_chat(rate: float) -> list[Arrival]:
    """Returns 200 requests that arrive together, and mixed prompts at a quarter of `rate`."""
    return [Arrival(1, 1500, 300) for _ in range(200)] + poisson(rate / 4, 60)
