"""Answers as hypothesis makes them: pieces of text, then pieces of calls, cut anywhere, with the
score of one token for each."""

import json

import numpy as np
from hypothesis import strategies as st

from serve_app.protocol.scores import TokenScore
from serve_app.protocol.text import TextDelta
from serve_app.protocol.tools import ToolCallDelta

Answer = list[TextDelta]
"""Deltas, the last of which has the reason."""


@st.composite
def answers(draw: st.DrawFn) -> Answer:
    """Returns the deltas of one answer. Calls are whole, and their arguments are objects."""
    texts = draw(
        st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), max_size=4)
    )
    deltas = [TextDelta(text) for text in texts]
    num_chars = 0
    for delta in deltas:
        delta.scores = [_score(num_chars)]
        num_chars += len(delta.text)
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
    for delta in deltas[len(texts) :]:
        delta.scores = [_score(num_chars)]
        num_chars += 1
    has_calls = any(delta.tool_calls for delta in deltas)
    reason = "tool_calls" if has_calls else draw(st.sampled_from(["stop", "length"]))
    deltas.append(TextDelta("", finish_reason=reason))
    for number, delta in enumerate(deltas, 1):
        delta.num_tokens = number
    return deltas


def _score(offset: int) -> TokenScore:
    """Returns one token whose text begins at `offset`, with two candidates."""
    return TokenScore(5, -0.5, np.array([5, 6]), np.array([-0.5, -np.inf], np.float32), offset)


def whole(deltas: Answer) -> TextDelta:
    """Returns the answer as one delta, as `Answer.whole` makes it."""
    last = deltas[-1]
    return TextDelta(
        "".join(delta.text for delta in deltas),
        [score for delta in deltas for score in delta.scores],
        finish_reason=last.finish_reason,
        num_tokens=last.num_tokens,
        tool_calls=[piece for delta in deltas for piece in delta.tool_calls],
    )
