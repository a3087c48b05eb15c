"""The dialogues the tiny model is trained on, and the questions it is examined with.

The same seed writes the same text, and no training dialogue contains a question of the examination.
"""

import random
from dataclasses import dataclass

from tools.tiny import facts, topics
from tools.tiny.topics import Pair, Topic


@dataclass(frozen=True)
class Dialogue:
    """Turns of question and answer, in order, with an optional system message."""

    turns: tuple[Pair, ...]
    system: str | None = None


TOPICS: dict[Topic, int] = {
    topics.sums: 22,
    topics.capitals: 10,
    topics.colours: 8,
    topics.about: 8,
    topics.greetings: 4,
    topics.unknown: 4,
    topics.repeating: 16,
    topics.spelling: 14,
    topics.objects: 8,
    topics.counting: 3,
    topics.stories: 2,
    topics.abroad: 4,
}
"""Each topic and its share of the training dialogues, in parts of about a hundred."""

CASUAL = (
    topics.sums,
    topics.capitals,
    topics.colours,
    topics.about,
    topics.greetings,
    topics.unknown,
    topics.counting,
)
"""Topics that are sometimes asked in small letters and without a question mark."""

EXAM: dict[Topic, int] = {
    topics.sums: 50,
    topics.capitals: 30,
    topics.colours: 25,
    topics.about: 15,
    topics.repeating: 30,
    topics.spelling: 30,
    topics.objects: 20,
}
"""Each topic that is examined and its number of questions: 200 in all."""

EXAM_SEED = 1
"""With some others no end is found: of a few facts every phrasing is trained on."""


def held_out() -> list[Pair]:
    """Returns 200 different questions with their exact answers; no training dialogue has one."""
    rng = random.Random(EXAM_SEED)
    pairs: dict[str, str] = {}
    for topic, count in EXAM.items():
        wanted = len(pairs) + count
        while len(pairs) < wanted:
            question, answer = topic(rng, True)
            pairs[question] = answer
    return list(pairs.items())


def _recall(rng: random.Random) -> list[Pair]:
    """Returns a dialogue in which the user says a name and later asks for it."""
    name = rng.choice(facts.NAMES)
    between = [_turn(rng) for _ in range(rng.randint(0, 2))]
    told = (f"My name is {name}.", f"Hello, {name}!")
    return [told, *between, ("What is my name?", f"Your name is {name}.")]


def _turn(rng: random.Random) -> Pair:
    topic = rng.choices(list(TOPICS), list(TOPICS.values()))[0]
    question, answer = topic(rng, False)
    if topic in CASUAL and rng.random() < 0.1:
        question = question.lower().rstrip(" ?.!")
    return question, answer


def _dialogue(rng: random.Random) -> Dialogue:
    system = rng.choice(facts.SYSTEMS) if rng.random() < 0.1 else None
    kind = rng.random()
    if kind < 0.75:
        turns = [_turn(rng)]
    elif kind < 0.85:
        turns = _recall(rng)
    elif kind < 0.99:
        turns = [_turn(rng) for _ in range(rng.randint(2, 4))]
    else:
        turns = [_turn(rng) for _ in range(rng.randint(5, 12))]
    return Dialogue(tuple(turns), system)


def training(count: int, seed: int = 0) -> list[Dialogue]:
    """Returns the first `count` training dialogues of this seed."""
    rng = random.Random(seed)
    return [_dialogue(rng) for _ in range(count)]
