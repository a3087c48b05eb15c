"""The tiny model through our own server: what four bits cost it."""

import asyncio

import pytest

from serve_app.api.server import MixtralServer
from serve_app.config.settings import Settings
from tests.fakes import answer
from tools.tiny.corpus import held_out

MAX_TOKENS = 64


def score(config: str) -> int:
    """Counts the held-out questions that are answered exactly, of 200 that are asked at once."""
    questions, answers = zip(*held_out(), strict=True)
    body = {"prompts": list(questions), "temperature": 0, "max_tokens": MAX_TOKENS}
    server = MixtralServer(Settings.from_yaml(config))
    try:
        results = asyncio.run(answer(server, "/prompt", body))["results"]
    finally:
        server.close()
    return sum(
        result["text"] == answer and result["finish_reason"] == "stop"
        for result, answer in zip(results, answers, strict=True)
    )


@pytest.fixture(scope="module")
def score_in_float32() -> int:
    return score("configs/tiny.yaml")


def test_the_served_model_passes_the_exam(score_in_float32: int) -> None:
    """At least 95 % of the held-out questions, through our engine, all in one batch."""
    assert score_in_float32 >= 190


def test_four_bits_cost_little(score_in_float32: int) -> None:
    """In NF4 the score falls by 3 points, 6 of 200 questions, at most."""
    assert score("configs/tiny-nf4.yaml") >= score_in_float32 - 6
