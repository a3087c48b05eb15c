"""Grammars that ended the whole process in llguidance, each tried in a process of its own."""

import json
import subprocess
import sys
from typing import Any

import pytest

from serve_app.protocol import tool_grammar
from serve_app.protocol.chat import ChatRequest
from serve_app.protocol.grammar_source import GrammarSource

NUM_LINKS = 3000
SMALLEST = -(2**63)
PROGRAM = """
import json, sys
from serve_app.errors import InvalidRequest
from serve_app.protocol.grammar_source import GrammarSource
from tests.protocol.test_grammar import allowed, compiled_grammar
try:
    state = compiled_grammar(GrammarSource(*json.load(sys.stdin))).start()
    print("compiled", len(allowed(state)) > 0)
except InvalidRequest as error:
    print("refused", error.param)
"""


def result(kind: str, text: str) -> tuple[int, str]:
    """Returns the exit code of a process that compiles the grammar, and what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps([kind, text, "field"]),
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout.strip()


@pytest.mark.parametrize(
    ("kind", "grammar"),
    [
        ("json", {"const": SMALLEST}),
        ("json", {"enum": ["a", -9223372036854775300]}),
        ("json", {"type": "integer", "minimum": -1e30, "maximum": -1e20}),
        ("lark", f'start: %json {{"const": {SMALLEST}}}'),
    ],
)
def test_a_number_without_end_is_refused(kind: str, grammar: Any) -> None:
    """The error names the field; llguidance would recurse until the stack ends."""
    text = grammar if isinstance(grammar, str) else json.dumps(grammar)
    assert result(kind, text) == (0, "refused field")


def test_numbers_are_checked_in_tools_and_in_the_answer_beside_them() -> None:
    """Both are parts of one grammar."""
    small, free = {"properties": {"a": {"const": SMALLEST}}}, {"type": "object"}
    for parameters, answer in ((small, free), (free, small)):
        tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
        body = {"messages": [{"role": "user", "content": "Hi"}], "tools": [tool]}
        tools = ChatRequest.read(body).offered_tools()
        assert tools is not None
        found = tool_grammar.source(tools, GrammarSource("json", json.dumps(answer), "field"))
        assert result("tools", found.text)[1].startswith("refused")


def link(number: int) -> str:
    return f"#/$defs/a{number}"


@pytest.mark.parametrize(
    ("kind", "grammar"),
    [
        (
            "json",
            {
                "$ref": link(0),
                "$defs": {f"a{i}": {"$ref": link(i + 1)} for i in range(NUM_LINKS)}
                | {f"a{NUM_LINKS}": {"type": "integer"}},
            },
        ),
        (
            "lark",
            "start: r0\n"
            + "".join(f"r{i}: r{i + 1}\n" for i in range(2 * NUM_LINKS))
            + f'r{2 * NUM_LINKS}: "a"',
        ),
    ],
)
def test_a_long_chain_has_room_on_the_stack(kind: str, grammar: Any) -> None:
    """Thousands of references or rules, each to the next one, are compiled."""
    text = grammar if isinstance(grammar, str) else json.dumps(grammar)
    assert result(kind, text) == (0, "compiled True")
