"""Tool calls in the text of answers: what is a call, what is content, in any pieces."""

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.protocol.tool_calls import MARKER, ToolCallParser
from serve_app.protocol.tools import ToolCallDelta, joined

NAMES = {"f", "get_weather", "a-b"}

Outcome = tuple[str, list[tuple[str, str]], bool]
"""Content, names and arguments of the calls, and whether the last call is complete."""


def read(pieces: Sequence[str]) -> Outcome:
    parser = ToolCallParser(NAMES)
    parsed = [parser.push(piece) for piece in pieces] + [parser.end()]
    calls = joined(delta for each in parsed for delta in each.calls)
    content = "".join(each.content for each in parsed)
    return content, [(call.name, call.arguments) for call in calls], parser.has_called


def cut(text: str, places: Sequence[int]) -> list[str]:
    ends = sorted({place % (len(text) + 1) for place in places} | {0, len(text)})
    return [text[a:b] for a, b in pairwise(ends)]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from('"\\{}[]'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)
call_lists = st.lists(
    st.tuples(st.sampled_from(sorted(NAMES)), st.dictionaries(st.text(max_size=4), values)),
    min_size=1,
    max_size=3,
)
places = st.lists(st.integers(0, 2000), max_size=12)


@given(call_lists, st.sampled_from([None, 1, "\t"]), st.booleans(), st.text(max_size=5), places)
def test_calls_are_what_json_says(
    calls: list[tuple[str, Any]], indent: Any, ascii_only: bool, before: str, where: list[int]
) -> None:
    """However JSON is spaced and cut, names and arguments are those that `json` reads, and the text
    before is content."""
    listed = [{"name": name, "arguments": arguments} for name, arguments in calls]
    spelled = json.dumps(listed, indent=indent, ensure_ascii=ascii_only)
    content, found, has_called = read(cut(f"{before}{MARKER} {spelled}", where))
    assert content == before.rstrip()
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls
    assert has_called


FRAGMENTS = [
    MARKER,
    MARKER[:5],
    "[",
    ' [{"name": "f", "arguments": {"a": [1, "}"]}}',
    '{"name"',
    ': "f", "arguments": {',
    "}",
    "]",
    ", ",
    '"',
    "\\",
    " ",
    "\n\n",
    "text",
    "f",
    ':"a-b"',
    "ü",
]


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=9).map("".join), places)
def test_pieces_do_not_matter(text: str, where: list[int]) -> None:
    """Any text, call or not, gives the same in one piece, in single characters and in any pieces;
    without a call every character is content."""
    whole = read([text])
    assert read(list(text)) == whole
    assert read(cut(text, where)) == whole
    if not whole[1]:
        assert whole[0] == text


@pytest.mark.parametrize(
    "text",
    [
        "[TOOL",
        "\n [TOOL_CALLS]",
        "[TOOL_CALLS] I would call f.",
        '[TOOL_CALLS] {"name": "f", "arguments": {}}',
        '[TOOL_CALLS] [{"name": "unknown", "arguments": {}}]',
        '[TOOL_CALLS] [{"name": "f", "arguments": [1]}]',
        '[TOOL_CALLS] [{"name": "f", "parameters": {}}]',
        '[TOOL_CALLS] [{"name": "f", "argum',
        '[TOOL_CALLS] ["f"]',
        "[TOOL_CALLS]" + " " * 2000,
        'Say "[TOOL_CALLS] []"',
    ],
)
def test_what_is_no_call_is_content(text: str) -> None:
    """A malformed call reaches the client as the text that it is."""
    assert read([text]) == (text, [], False)


@pytest.mark.parametrize(
    ("text", "calls", "is_complete"),
    [
        ('[{"name": "f", "arguments": {"a": "b', [("f", '{"a": "b')], False),
        ('[{"name": "f", "arguments": {"a": 1}', [("f", '{"a": 1}')], True),
        ('[{"name": "f", "arguments": {}}, {"name": "a-', [("f", "{}")], True),
        (
            '[{"name": "f", "arguments": {}}, {"name": "a-b", "arguments": {',
            [("f", "{}"), ("a-b", "{")],
            False,
        ),
    ],
)
def test_an_answer_that_is_cut_has_the_calls_so_far(
    text: str, calls: list[tuple[str, str]], is_complete: bool
) -> None:
    """Where `max_tokens` cuts an answer, the client gets the arguments so far, and no syntax."""
    assert read([MARKER + " " + text]) == ("", calls, is_complete)


def test_text_behind_a_list_that_breaks_is_content() -> None:
    """Calls that are complete stay calls, and what follows them is not lost."""
    text = '[TOOL_CALLS] [{"name": "f", "arguments": {}} and more'
    assert read([text]) == ("} and more", [("f", "{}")], True)


def test_the_deltas_of_a_call() -> None:
    """The first delta has id and name alone, and the next ones arguments as they come."""
    parser = ToolCallParser(NAMES)
    pieces = ['[TOOL_CALLS] [{"name": "f", "arguments": ', '{"a', '": 1', "}}]"]
    deltas = [delta for piece in pieces for delta in parser.push(piece).calls]
    assert deltas[0].id is not None
    assert deltas[0].id.startswith("call_")
    assert deltas == [
        ToolCallDelta(0, "", deltas[0].id, "f"),
        ToolCallDelta(0, '{"a'),
        ToolCallDelta(0, '": 1'),
        ToolCallDelta(0, "}"),
    ]


def test_ids_differ() -> None:
    """Each call has an id of its own."""
    parser = ToolCallParser(NAMES)
    one = '{"name": "f", "arguments": {}}'
    calls = joined(parser.push(f"{MARKER} [{one}, {one}]").calls)
    assert len({call.id for call in calls}) == 2
