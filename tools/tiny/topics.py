"""The questions for the tiny model: one of each topic, with its exact answer.

Each is for training or for the examination. What is examined (a fact in a held-out phrasing, unseen
operands, unseen words) is decided by a checksum, so that training never draws it.
"""

import json
import random
from collections.abc import Callable
from functools import cache
from zlib import crc32

from tools.tiny import facts

Pair = tuple[str, str]
"""A question and its exact answer."""

Topic = Callable[[random.Random, bool], Pair]
"""Draws a question by the random numbers; True: one of the examination's."""

LEADS = ("", "", "", "", "Please answer: ", "Tell me: ", "A question: ", "Hello! ", "Quickly: ")
TAILS = ("", "", "", "", " Thank you.", " Please.")


def _is_held_out(*what: object) -> bool:
    return crc32(repr(what).encode()) % 8 == 0


@cache
def _split(words: tuple[str, ...], exam: bool) -> list[str]:
    return [word for word in words if _is_held_out(word) == exam]


def _phrase(
    rng: random.Random, exam: bool, fact: str, phrasings: tuple[str, ...], plain: float = 0.3
) -> str:
    """Returns one phrasing of a fact, from the side of the split that is asked for.

    Bare phrasings are always trained on: a user's first try is most often one of them.
    """
    while True:
        lead, tail = rng.choice(LEADS), rng.choice(TAILS)
        phrasing = phrasings[0] if rng.random() < plain else rng.choice(phrasings)
        text = f"{lead}{phrasing}{tail}"
        if (_is_held_out(fact, text) and text not in phrasings) == exam:
            return text


def sums(rng: random.Random, exam: bool) -> Pair:
    while True:
        a, b = rng.randint(0, 30), rng.randint(0, 30)
        if _is_held_out(min(a, b), max(a, b)) == exam:
            break
    frames = ("What is {a} + {b}?", "{a} + {b} = ?", "Add {a} and {b}.", "What is {a}+{b}?")
    lead = "" if rng.random() < 0.7 else rng.choice(LEADS)
    return lead + rng.choice(frames).format(a=a, b=b), f"{a} + {b} = {a + b}."


def capitals(rng: random.Random, exam: bool) -> Pair:
    country, city = rng.choice(list(facts.CAPITALS.items()))
    phrasings = (
        f"What is the capital of {country}?",
        f"Name the capital of {country}.",
        f"Which city is the capital of {country}?",
        f"{country}: what is its capital?",
    )
    return _phrase(rng, exam, country, phrasings), f"The capital of {country} is {city}."


def colours(rng: random.Random, exam: bool) -> Pair:
    thing, colour = rng.choice(list(facts.COLOURS.items()))
    phrasings = (
        f"What colour is {thing}?",
        f"What color is {thing}?",
        f"Which colour has {thing}?",
        f"Name the colour of {thing}.",
    )
    return _phrase(rng, exam, thing, phrasings), f"{thing[0].upper()}{thing[1:]} is {colour}."


def about(rng: random.Random, exam: bool) -> Pair:
    phrasings, answer = rng.choice(list(facts.ABOUT.items()))
    return _phrase(rng, exam, answer, phrasings, plain=0.0), answer


def greetings(rng: random.Random, exam: bool) -> Pair:
    phrasings, answer = rng.choice(list(facts.GREETINGS.items()))
    return rng.choice(phrasings), answer


def unknown(rng: random.Random, exam: bool) -> Pair:
    question = rng.choice(facts.UNKNOWN)
    return _phrase(rng, exam, "unknown", (question,)), facts.UNKNOWN_ANSWER


def _word(rng: random.Random, exam: bool) -> str:
    """Returns a word of its side; for training, mostly invented ones, to learn pieces and not
    words.

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


def repeating(rng: random.Random, exam: bool) -> Pair:
    words = " ".join(_word(rng, exam) for _ in range(rng.randint(1, 5)))
    frames = ("Repeat: {}", "Repeat after me: {}", "Say: {}", "Echo: {}")
    return rng.choice(frames).format(words), words


def spelling(rng: random.Random, exam: bool) -> Pair:
    word = _word(rng, exam)
    frames = ("Spell the word {}.", "Spell {}.", "How do you spell {}?", "Spell: {}")
    return rng.choice(frames).format(word), " ".join(word)


def objects(rng: random.Random, exam: bool) -> Pair:
    """Returns a question with a JSON answer: two given fields, or a fact under its name."""
    if rng.random() < 0.4:
        country, city = rng.choice(list(facts.CAPITALS.items()))
        question = _phrase(rng, exam, country, (f"The capital of {country} as JSON.",))
        return question, json.dumps({"country": country, "capital": city})
    name, age = rng.choice(facts.NAMES), rng.randint(1, 99)
    while _is_held_out(name, age) != exam:
        name, age = rng.choice(facts.NAMES), rng.randint(1, 99)
    frames = ("JSON with name {} and age {}.", "Write JSON: name {}, age {}.")
    return rng.choice(frames).format(name, age), json.dumps({"name": name, "age": age})


def counting(rng: random.Random, exam: bool) -> Pair:
    while True:
        first = 1 if rng.random() < 0.6 else rng.randint(1, 30)
        last = first + rng.randint(2, 99 if rng.random() < 0.05 else 30)
        if (_is_held_out(first, last) and first > 1) == exam:
            break
    frames = ("Count from {} to {}.", "Count from {} up to {}.")
    numbers = ", ".join(str(number) for number in range(first, last + 1))
    return rng.choice(frames).format(first, last), f"{numbers}."


def stories(rng: random.Random, exam: bool) -> Pair:
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


def abroad(rng: random.Random, exam: bool) -> Pair:
    """Answers whose characters are several tokens each."""
    if rng.random() < 0.4:
        name, picture = rng.choice(list(facts.EMOJI.items()))
        phrasings = (f"Show me a {name} emoji.", f"Send a {name} emoji.")
        return _phrase(rng, exam, name, phrasings), picture
    language, text = rng.choice(list(facts.ABROAD.items()))
    phrasings = (f"Greet me in {language}.", f"Say hello in {language}.")
    return _phrase(rng, exam, language, phrasings), text
