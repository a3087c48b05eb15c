"""The dialogues: repeatable, and the examination is not among them."""

import json
from collections.abc import Iterable
from functools import cache

from tools.tiny import corpus
from tools.tiny.topics import Pair

DIALOGUES = 20_000


@cache
def trained_pairs() -> frozenset[Pair]:
    return frozenset(pair for dialogue in corpus.training(DIALOGUES) for pair in dialogue.turns)


def test_no_held_out_question_is_trained_on() -> None:
    """The exam asks what training never saw: no question of it occurs in any dialogue."""
    questions = {question for question, _ in trained_pairs()}
    exam = {question for question, _ in corpus.held_out()}
    assert len(exam) == 200
    assert not exam & questions


def test_no_held_out_operands_are_trained_on() -> None:
    """Held-out sums are new as sums, in either order, and not only in their wording."""

    def operands(pairs: Iterable[Pair]) -> set[frozenset[str]]:
        sums = (answer.split(" = ")[0] for _, answer in pairs if " + " in answer)
        return {frozenset(text.split(" + ")) for text in sums}

    exam = operands(corpus.held_out())
    assert len(exam) > 20
    assert not exam & operands(trained_pairs())


def test_no_held_out_word_is_spelled_in_training() -> None:
    """The words to spell and to repeat in the exam occur in no trained answer of that kind."""

    def spelled(pairs: Iterable[Pair]) -> set[str]:
        return {answer for question, answer in pairs if "pell" in question}

    exam = spelled(corpus.held_out())
    assert len(exam) > 10
    assert not exam & spelled(trained_pairs())


def test_the_same_seed_writes_the_same_dialogues() -> None:
    """Training can be repeated: a seed fixes the text, another seed gives other text."""
    assert corpus.training(200, seed=3) == corpus.training(200, seed=3)
    assert corpus.training(200, seed=3) != corpus.training(200, seed=4)
    assert corpus.held_out() == corpus.held_out()


def test_json_answers_parse() -> None:
    """Every answer to a question for JSON is a JSON object."""
    answers = [answer for question, answer in trained_pairs() if "JSON" in question]
    assert answers
    assert all(isinstance(json.loads(answer), dict) for answer in answers)
