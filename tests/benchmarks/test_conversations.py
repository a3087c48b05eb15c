"""Conversations grow by turns and answers, and each turn has its own figures."""

import asyncio
from typing import Any

import aiohttp
import pytest

from benchmarks import conversations
from benchmarks.conversations import TOKENS, TURNS, WORDS, conversation, figures, measure
from benchmarks.load import Answer, Outcome
from benchmarks.running_server import RunningServer

EVENT = b'data: {"choices": [{"text": " answer", "finish_reason": "length"}]}\n\n'


class Sent:
    """Takes the place of `load.send`; answers every request, or only the first ones."""

    def __init__(self, num_answered: int = 1000) -> None:
        self.bodies: list[dict[str, Any]] = []
        self._num_answered = num_answered

    async def __call__(
        self, session: aiohttp.ClientSession, url: str, body: dict[str, Any], start: float
    ) -> Answer:
        self.bodies.append(body)
        status = 200 if len(self.bodies) <= self._num_answered else 500
        return Answer(0.0, status, parts=[(0.1, EVENT)])


@pytest.fixture
def server() -> RunningServer:
    return RunningServer("http://nowhere", "tiny")


def hold(server: RunningServer, turns: list[str]) -> list[Outcome]:
    async def held() -> list[Outcome]:
        async with aiohttp.ClientSession() as session:
            return await conversation(session, server, turns, 0.0)

    return asyncio.run(held())


def test_a_turn_follows_all_turns_and_answers_before(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each prompt begins with the last prompt and its answer."""
    sent = Sent()
    monkeypatch.setattr(conversations, "send", sent)
    assert [outcome.error for outcome in hold(server, ["one", "two", "three"])] == [None] * 3
    assert [body["prompt"] for body in sent.bodies] == [
        " one",
        " one answer two",
        " one answer two answer three",
    ]
    assert {body["max_tokens"] for body in sent.bodies} == {TOKENS}


def test_a_conversation_ends_after_a_failed_turn(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refused turn is the last one, because there is no answer to go on from."""
    monkeypatch.setattr(conversations, "send", Sent(num_answered=1))
    outcomes = hold(server, ["one", "two", "three"])
    assert [outcome.error for outcome in outcomes] == [None, "status 500"]


def test_all_conversations_hold_all_turns(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A warm-up and so many conversations are sent; no two begin alike, and only these count."""
    sent = Sent()
    monkeypatch.setattr(conversations, "send", sent)
    found = asyncio.run(measure(server, 3))
    assert len(sent.bodies) == 4 * TURNS
    firsts = [body["prompt"] for body in sent.bodies if "answer" not in body["prompt"]]
    assert len({text.split()[0] + text.split()[1] for text in firsts}) == 4
    assert {len(text.split()) for text in firsts} == {WORDS}
    assert (found["requests"], found["errors"]) == (3 * TURNS, 0)


def test_first_tokens_are_counted_by_turn() -> None:
    """Turn 6 waited three times as long as turn 1; turns that were not sent are errors."""
    whole = [Outcome(turn, [turn + 0.1 * (3 if turn == 5 else 1)], 1) for turn in range(TURNS)]
    broken = [Outcome(0, [0.1], 1), Outcome(1, error="status 500")]
    found = figures([whole, broken], 10.0)
    assert found["first_token_ms"]["1"]["p50"] == pytest.approx(100)
    assert found["first_token_ms"]["6"]["p50"] == pytest.approx(300)
    assert found["last_turn_to_first"] == 3.0
    assert found["errors"] == 1 + TURNS - 2
    assert found["tokens_per_s"] == 0.7
