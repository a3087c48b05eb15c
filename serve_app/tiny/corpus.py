"""The dialogues the tiny model is trained on, and the questions it is examined with.

The same seed writes the same text. What the examination asks (a fact in a held-out phrasing, unseen
operands, unseen words) is decided by a checksum, so that no training dialogue contains it.

Knows nothing about tokens or the chat template.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from zlib import crc32

from serve_app.tiny import facts

Pair = tuple[str, str]
"""A question and its exact answer."""

LEADS = ("", "", "", "", "Please answer: ", "Tell me: ", "A question: ", "Hello! ", "Quickly: ")
TAILS = ("", "", "", "", " Thank you.", " Please.")


@dataclass(frozen=True)
class Dialogue:
    """Turns of question and answer, in order, with an optional system message."""

    turns: tuple[Pair, ...]
    system: str | None = None


def _is_held_out(*what: object) -> bool:
    return crc32(repr(what).encode()) % 8 == 0


@cache
def _split(words: tuple[str, ...], exam: bool) -> list[str]:
    return [word for word in words if _is_held_out(word) == exam]


def _phrase(
    rng: random.Random, exam: bool, fact: str, phrasings: tuple[str, ...], plain: float = 0.3
) -> str:
    """One phrasing of a fact, from the side of the split that is asked for.

    Bare phrasings are always trained on, so that nobody's first try is an exam.
    """
    while True:
        lead, tail = rng.choice(LEADS), rng.choice(TAILS)
        phrasing = phrasings[0] if rng.random() < plain else rng.choice(phrasings)
        text = f"{lead}{phrasing}{tail}"
        if (_is_held_out(fact, text) and text not in phrasings) == exam:
            return text


def _sums(rng: random.Random, exam: bool) -> Pair:
    while True:
        a, b = rng.randint(0, 30), rng.randint(0, 30)
        if _is_held_out(min(a, b), max(a, b)) == exam:
            break
    frames = ("What is {a} + {b}?", "{a} + {b} = ?", "Add {a} and {b}.", "What is {a}+{b}?")
    lead = "" if rng.random() < 0.7 else rng.choice(LEADS)
    return lead + rng.choice(frames).format(a=a, b=b), f"{a} + {b} = {a + b}."


def _capitals(rng: random.Random, exam: bool) -> Pair:
    country, city = rng.choice(list(facts.CAPITALS.items()))
    phrasings = (
        f"What is the capital of {country}?",
        f"Name the capital of {country}.",
        f"Which city is the capital of {country}?",
        f"{country}: what is its capital?",
    )
    return _phrase(rng, exam, country, phrasings), f"The capital of {country} is {city}."


def _colours(rng: random.Random, exam: bool) -> Pair:
    thing, colour = rng.choice(list(facts.COLOURS.items()))
    phrasings = (
        f"What colour is {thing}?",
        f"What color is {thing}?",
        f"Which colour has {thing}?",
        f"Name the colour of {thing}.",
    )
    return _phrase(rng, exam, thing, phrasings), f"{thing[0].upper()}{thing[1:]} is {colour}."


def _about(rng: random.Random, exam: bool) -> Pair:
    phrasings, answer = rng.choice(list(facts.ABOUT.items()))
    return _phrase(rng, exam, answer, phrasings, plain=0.0), answer


def _greetings(rng: random.Random, exam: bool) -> Pair:
    phrasings, answer = rng.choice(list(facts.GREETINGS.items()))
    return rng.choice(phrasings), answer


def _unknown(rng: random.Random, exam: bool) -> Pair:
    question = rng.choice(facts.UNKNOWN)
    return _phrase(rng, exam, "unknown", (question,)), facts.UNKNOWN_ANSWER


def _word(rng: random.Random, exam: bool) -> str:
    """A word of its side; for training, mostly invented ones, to learn pieces and not words.

    An invented word is the beginning of one word and the end of another, so that every piece that
    the tokenizer knows is met, and a held-out word never.
    """
    if exam or rng.random() < 0.3:
        return rng.choice(_split(facts.WORDS, exam))
    while True:
        first, second = rng.choice(facts.WORDS), rng.choice(facts.WORDS)
        start = rng.randrange(len(second))
        word = first[: rng.randint(0, len(first))] + second[start:]
        if word not in _split(facts.WORDS, True):
            return word


def _repeating(rng: random.Random, exam: bool) -> Pair:
    words = " ".join(_word(rng, exam) for _ in range(rng.randint(1, 5)))
    frames = ("Repeat: {}", "Repeat after me: {}", "Say: {}", "Echo: {}")
    return rng.choice(frames).format(words), words


def _spelling(rng: random.Random, exam: bool) -> Pair:
    word = _word(rng, exam)
    frames = ("Spell the word {}.", "Spell {}.", "How do you spell {}?", "Spell: {}")
    return rng.choice(frames).format(word), " ".join(word)


def _objects(rng: random.Random, exam: bool) -> Pair:
    """Simple JSON answers: two given fields, or a fact under its name."""
    if rng.random() < 0.4:
        country, city = rng.choice(list(facts.CAPITALS.items()))
        question = _phrase(rng, exam, country, (f"The capital of {country} as JSON.",))
        return question, json.dumps({"country": country, "capital": city})
    name, age = rng.choice(facts.NAMES), rng.randint(1, 99)
    while _is_held_out(name, age) != exam:
        name, age = rng.choice(facts.NAMES), rng.randint(1, 99)
    frames = ("JSON with name {} and age {}.", "Write JSON: name {}, age {}.")
    return rng.choice(frames).format(name, age), json.dumps({"name": name, "age": age})


def _counting(rng: random.Random, exam: bool) -> Pair:
    while True:
        first = 1 if rng.random() < 0.6 else rng.randint(1, 30)
        last = first + rng.randint(2, 99 if rng.random() < 0.05 else 30)
        if (_is_held_out(first, last) and first > 1) == exam:
            break
    frames = ("Count from {} to {}.", "Count from {} up to {}.")
    numbers = ", ".join(str(number) for number in range(first, last + 1))
    return rng.choice(frames).format(first, last), f"{numbers}."


def _stories(rng: random.Random, exam: bool) -> Pair:
    article_and_animal = [f"a{'n' * (animal[0] in 'aeiou')} {animal}" for animal in facts.ANIMALS]
    subject = rng.choice(article_and_animal)
    animal = subject.split()[1]
    phrasings = (f"Tell me a story about {subject}.", f"Tell a story about {subject}.")
    story = (
        f"Once upon a time there was {subject} who lived by a river. Every morning the {animal} "
        f"walked to the old mill and looked at the water. One day the {animal} met a friend, and "
        f"the two walked on together until the sun went down. In the evening they shared bread "
        f"and honey, and the {animal} was never alone again. The end."
    )
    return _phrase(rng, exam, subject, phrasings), story


def _abroad(rng: random.Random, exam: bool) -> Pair:
    """Answers whose characters are several tokens each."""
    if rng.random() < 0.4:
        name, picture = rng.choice(list(facts.EMOJI.items()))
        phrasings = (f"Show me a {name} emoji.", f"Send a {name} emoji.")
        return _phrase(rng, exam, name, phrasings), picture
    language, text = rng.choice(list(facts.ABROAD.items()))
    phrasings = (f"Greet me in {language}.", f"Say hello in {language}.")
    return _phrase(rng, exam, language, phrasings), text


TOPICS: dict[Callable[[random.Random, bool], Pair], int] = {
    _sums: 22,
    _capitals: 10,
    _colours: 8,
    _about: 8,
    _greetings: 4,
    _unknown: 4,
    _repeating: 16,
    _spelling: 14,
    _objects: 8,
    _counting: 3,
    _stories: 2,
    _abroad: 4,
}
"""Each topic and its share of the training dialogues, in parts of about a hundred."""

CASUAL = (_sums, _capitals, _colours, _about, _greetings, _unknown, _counting)
"""Topics that are sometimes asked in small letters and without a question mark."""

EXAM: dict[Callable[[random.Random, bool], Pair], int] = {
    _sums: 50,
    _capitals: 30,
    _colours: 25,
    _about: 15,
    _repeating: 30,
    _spelling: 30,
    _objects: 20,
}
"""Each topic that is examined and its number of questions: 200 in all."""


def held_out(seed: int = 1) -> list[Pair]:
    """200 different questions with their exact answers; no training dialogue contains one."""
    rng = random.Random(seed)
    pairs: dict[str, str] = {}
    for topic, count in EXAM.items():
        wanted = len(pairs) + count
        while len(pairs) < wanted:
            question, answer = topic(rng, True)
            pairs[question] = answer
    return list(pairs.items())


def _recall(rng: random.Random) -> list[Pair]:
    """A name told, perhaps something else between, and asked for."""
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
    """The first `count` training dialogues of this seed."""
    rng = random.Random(seed)
    return [_dialogue(rng) for _ in range(count)]
