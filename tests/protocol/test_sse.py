"""Events: one line of JSON for any text, which parses to the same value."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.protocol.sse import DONE, event

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(-1e6, 1e6) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=10,
)


@given(st.dictionaries(TEXTS.filter(lambda name: name != "type"), VALUES, max_size=4))
def test_an_event_is_one_line_and_its_value(chunk: dict[str, Any]) -> None:
    """Any text, line ends of any script too, is one `data:` line; any JSON reader gets it back."""
    text = event(chunk).decode()
    line, *rest = text.splitlines()
    assert (line[:6], rest) == ("data: ", [""])
    assert text.endswith("\n\n")
    assert json.loads(line[6:]) == chunk


def test_a_chunk_with_a_type_is_an_event_of_that_name() -> None:
    """Anthropic's clients read the name, and no `data:` line without one."""
    chunk = {"type": "message_stop", "index": 1}
    assert event(chunk) == b'event: message_stop\ndata: {"type":"message_stop","index":1}\n\n'


@pytest.mark.parametrize("value", ["\ud83d", object(), b"bytes", {1: "key"}])
def test_what_json_does_not_have_is_refused(value: Any) -> None:
    """A lone surrogate, an arbitrary object and a key that is not a string each raise an error."""
    with pytest.raises(TypeError):
        event({"token": value})


def test_the_end_is_openais() -> None:
    """The bytes that OpenAI's clients expect."""
    assert DONE == b"data: [DONE]\n\n"
