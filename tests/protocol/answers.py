"""Answers as hypothesis makes them: pieces of text, then pieces of calls, cut anywhere."""

import json

from hypothesis import strategies as st

from serve_app.protocol.text import TextDelta
from serve_app.protocol.tools import ToolCallDelta

Answer = list[TextDelta]
"""Deltas, the last of which has the reason."""


@st.composite
def answers(draw: st.DrawFn) -> Answer:
    """The deltas of one answer. Calls are whole, and their arguments are objects."""
    texts = draw(
        st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), max_size=4)
    )
    deltas = [TextDelta(text) for text in texts]
    for index in range(draw(st.integers(0, 3))):
        arguments = json.dumps(draw(st.dictionaries(st.text("ab"), st.integers(), max_size=2)))
        cut = draw(st.integers(0, len(arguments)))
        first = ToolCallDelta(index, id=f"call_{index}", name=f"tool_{index}")
        pieces = [
            first,
            ToolCallDelta(index, arguments[:cut]),
            ToolCallDelta(index, arguments[cut:]),
        ]
        # A delta may have several pieces, of several calls.
        if draw(st.booleans()) or not deltas:
            deltas += [TextDelta("", tool_calls=[piece]) for piece in pieces]
        else:
            deltas[-1].tool_calls += pieces
    has_calls = any(delta.tool_calls for delta in deltas)
    reason = "tool_calls" if has_calls else draw(st.sampled_from(["stop", "length"]))
    deltas.append(TextDelta("", finish_reason=reason))
    for number, delta in enumerate(deltas, 1):
        delta.num_tokens = number
    return deltas


def whole(deltas: Answer) -> TextDelta:
    """The answer as one delta, as `Answer.whole` makes it."""
    last = deltas[-1]
    return TextDelta(
        "".join(delta.text for delta in deltas),
        finish_reason=last.finish_reason,
        num_tokens=last.num_tokens,
        tool_calls=[piece for delta in deltas for piece in delta.tool_calls],
    )
