"""Grammars that would take minutes or all memory are refused, and no other grammar waits."""

import asyncio
import json
from typing import Any

import pytest

from serve_app.errors import InvalidRequest
from serve_app.protocol.grammar import GrammarCompiler
from serve_app.protocol.grammar_source import GrammarSource
from serve_app.protocol.grammar_trial import is_needed
from tests.fakes import VOCAB_SIZE, tokenizer

DOUBLED = "start: T16\nT0: /a?/\n" + "\n".join(f"T{i + 1}: T{i} T{i}" for i in range(16))
SHORT = GrammarSource("choice", '["yes"]', "f")


def compiler() -> GrammarCompiler:
    return GrammarCompiler(tokenizer().backend, VOCAB_SIZE, {2})


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("regex", "a*" * 49_000),  # all memory
        ("lark", DOUBLED),  # minutes
    ],
)
def test_a_grammar_that_explodes_is_refused(kind: Any, text: str) -> None:
    """Its error says so, and a short grammar is compiled meanwhile."""
    grammars = compiler()

    async def both() -> None:
        exploding = asyncio.create_task(
            grammars.compiled(GrammarSource(kind, text, "f"), begins_text=True)
        )
        assert await grammars.compiled(SHORT, begins_text=True)
        assert not exploding.done()
        with pytest.raises(InvalidRequest, match="too much time or memory"):
            await exploding

    asyncio.run(both())


def test_a_schema_with_several_patterns_is_tried() -> None:
    """Patterns in an `allOf` multiply each other; most schemas have none, and are not tried."""
    patterns = [{"pattern": f".*{number}.*"} for number in range(3)]
    for schema, is_tried in (({"allOf": patterns}, True), ({"allOf": patterns[:2]}, False)):
        assert is_needed(GrammarSource("json", json.dumps(schema), "f")) is is_tried


def test_a_long_grammar_that_does_not_explode_is_compiled() -> None:
    """A regular expression of 90,000 characters with 8,000 alternatives is no problem."""
    found = GrammarSource("regex", "|".join(f"w{number}[a-z]*" for number in range(8000)), "f")
    assert asyncio.run(compiler().compiled(found, begins_text=True))
